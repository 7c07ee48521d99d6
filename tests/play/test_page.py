"""The page: the server's answer, and what a visitor sees and does in a real browser."""

import json
import re
import shlex
import shutil
import socket
import threading
import time
import urllib.request

import pytest
import uvicorn
from PIL import Image
from test_play import TAG, Seen, adapters

from respodiff_jax.evaluation.suites import Suite
from respodiff_jax.play.page import mount
from respodiff_jax.play.studio import Studio

# NiceGUI looks at all objects when it starts, also at a deprecated one of PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.reduce_op:FutureWarning")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def studio(tiny_backbone):
    """The pictures of a profession are counted by a stand-in."""
    studio = Studio(tiny_backbone, adapters(tiny_backbone), ["here"])
    studio.painter.batch_size = 8  # one picture for each simulated device
    studio.suite = Suite(
        "test",
        "clip",
        ("cook", TAG),
        ("a photo of {a_subject}",),
        {"gender": {"woman": ("a woman",), "man": ("a man",)}},
    )
    studio.judge = Seen()
    return studio


@pytest.fixture(scope="module")
def address(studio):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(mount(studio), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        until = time.monotonic() + 60
        while not server.started and time.monotonic() < until:
            time.sleep(0.05)
        yield "http://{}:{}/".format(*listening.getsockname())
        server.should_exit = True
        thread.join(20)


def test_the_server_answers_with_texts_as_texts_and_nothing_from_outside(address):
    with urllib.request.urlopen(address, timeout=60) as answer:
        text = answer.read().decode()
    assert "RespoDiff playground" in text and "Before and after" in text
    assert TAG not in text
    assert not re.findall("https?://(?!www.w3.org)[^'\" ]+", text.replace(address, ""))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


class Visitor:
    """A browser on the page, which records what it loads and what goes wrong."""

    def __init__(self, browser, address, **options):
        self.context = browser.new_context(accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(300_000)  # the first visitor compiles
        self.outside, self.wrong = [], []
        self.page.on("request", lambda r: self._requested(r.url, address))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.goto(address)
        self.wait()

    def _requested(self, url, address):
        if not url.startswith((address, "data:", "blob:", address.replace("http", "ws"))):
            self.outside.append(url)

    def wait(self, status="done"):
        """Until what is under way has ended."""
        self.page.wait_for_timeout(700)
        self.page.wait_for_function(
            "s => document.querySelector('.status').innerText.trim().startsWith(s)", arg=status
        )

    def sources(self):
        """The visible pictures, before and after in turn."""
        return self.page.eval_on_selector_all(
            ".pair img", "all => all.filter(e => e.offsetParent).map(e => e.src)"
        )

    def reasons(self):
        return [text for text in self.page.locator(".pair .reason").all_inner_texts() if text]

    def switch(self, name):
        self.page.get_by_role("switch", name=name).click()
        self.wait()

    def slide(self, name, key, times=1):
        named = self.page.get_by_role("slider", name=name).locator("visible=true")
        slider = named.first.locator("[tabindex]")  # what takes the keys
        slider.focus()
        for _ in range(times):
            slider.press(key)
        self.wait()

    def write(self, text):
        self.page.get_by_label("Prompt", exact=True).fill(text)
        self.wait()

    def download(self, click, folder):
        with self.page.expect_download() as found:
            click()
        path = folder / found.value.suggested_filename
        found.value.save_as(path)
        return path

    def close(self):
        self.context.close()
        assert self.outside == [] and self.wrong == []


@pytest.fixture
def visitor(browser, address):
    visitor = Visitor(browser, address, viewport={"width": 1400, "height": 900})
    yield visitor
    visitor.close()


def in_browser(test):
    """Marks a test that needs chromium."""
    skipped = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the path")
    return pytest.mark.browser(skipped(test))


@in_browser
def test_controls_redraw_and_lines_say_why(visitor):
    first = visitor.sources()
    assert len(first) == 16 and all(a != b for a, b in zip(first[::2], first[1::2], strict=True))
    assert sum("a woman" in line for line in visitor.reasons()) == 4
    visitor.write("a farmer")
    second = visitor.sources()
    assert not set(first) & set(second)
    controls = visitor.page.locator(".controls")
    assert controls.inner_text().count("50\u00a0%") == 2
    visitor.slide("a woman", "PageDown", 5)  # no part of the pictures
    assert not any("a woman" in line for line in visitor.reasons())
    assert "100\u00a0%" in controls.inner_text()
    visitor.switch("Fair: each picture gets one")
    third = visitor.sources()
    assert third[::2] == second[::2] and third[1::2] == third[::2]
    assert all("no concept is chosen" in line for line in visitor.reasons())
    visitor.slide("a woman", "ArrowRight", 4)
    assert all("a woman × 0.2" in line for line in visitor.reasons())
    assert visitor.sources()[1::2] != third[::2]
    visitor.slide("a woman", "PageDown")
    visitor.switch("Safe")
    assert all(f"{TAG} × 0.5" in line for line in visitor.reasons())


@in_browser
def test_downloads_hold_what_the_page_shows(visitor, tmp_path):
    page = visitor.page
    for name in ("before", "after"):
        button = page.get_by_label(f"download {name} 2", exact=True)
        with Image.open(visitor.download(button.click, tmp_path)) as picture:
            record = json.loads(picture.info["parameters"])
        assert record["seed"] == 2 and record["num_steps"] == 20
        assert bool(record["concepts"]) == (name == "after")
    grid = visitor.download(page.get_by_text("Download all as one picture").click, tmp_path)
    with Image.open(grid) as image:
        assert image.width > 8 * 128
    command = visitor.download(page.get_by_text("Download the command").click, tmp_path)
    words = shlex.split(command.read_text().replace("\\\n", " "))
    assert words[:2] == ["respodiff", "generate"] and "--fair" in words


@in_browser
def test_what_is_under_way_can_be_cancelled(visitor):
    before = visitor.sources()
    page = visitor.page
    page.get_by_text("More", exact=True).click()
    page.get_by_role("slider", name="Steps").locator("[tabindex]").focus()
    for _ in range(8):
        page.keyboard.press("PageUp")
    page.get_by_text("Cancel", exact=True).click()
    visitor.wait("cancelled")
    page.wait_for_timeout(500)
    assert page.locator(".status").inner_text().strip() == "cancelled"
    assert visitor.sources() == before
    visitor.slide("Steps", "PageDown", 9)
    assert visitor.sources() != before


@in_browser
def test_two_browsers_draw_at_once_and_keep_apart(visitor, browser, address):
    other = Visitor(browser, address)
    for one, prompt in ((visitor, "a judge"), (other, "a pilot")):
        one.page.get_by_label("Prompt", exact=True).fill(prompt)
    for one, prompt in ((visitor, "a judge"), (other, "a pilot")):
        one.wait()
        assert prompt in one.page.locator(".command").inner_text()
    assert not set(visitor.sources()) & set(other.sources())
    other.close()


@in_browser
def test_long_and_hostile_prompts_are_text(visitor):
    visitor.write(" ".join(["doctor"] * 200))
    assert "too long for the model" in visitor.page.locator("[role=alert]").inner_text()
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    visitor.write(attack)
    assert visitor.page.locator("[role=alert]").is_hidden()
    assert attack in visitor.page.locator(".command").inner_text()
    assert TAG in visitor.page.locator(".controls").inner_text()
    assert visitor.page.locator("b[onclick], img[src=x]").count() == 0
    visitor.page.get_by_label("Prompt", exact=True).fill(" ")
    visitor.page.get_by_text("the prompt is empty").wait_for()


@in_browser
def test_measuring_and_exploring(visitor, studio, tmp_path):
    page = visitor.page
    studio.judge = Seen()
    page.get_by_role("tab", name="Measure this").click()
    page.get_by_role("button", name="Measure this").click()
    visitor.wait()
    counted = page.locator(".measure").inner_text()
    # Of 40 pictures the judge took the first ten for women. Kept pictures come first.
    women = dict(re.findall(r"(base|adapted): woman (\d+) of 20", counted))
    assert set(women) == {"base", "adapted"} and sum(map(int, women.values())) == 10
    page.get_by_role("tab", name="Explore").click()
    page.get_by_role("button", name="Draw the strip").click()
    visitor.wait()
    sources = page.eval_on_selector_all(".strip img", "all => all.map(e => e.src)")
    assert len(set(sources)) == 7
    strip = visitor.download(page.get_by_text("Download the strip").click, tmp_path)
    with Image.open(strip) as image:
        assert image.width > 7 * 128
    assert page.locator(".strip.stale").count() == 0
    page.get_by_role("switch", name="Safe").click()
    page.get_by_text("The settings changed. Press the button").wait_for()
    assert page.locator(".strip.stale").count() == 1
    page.get_by_role("button", name="Draw the strip").click()
    visitor.wait()
    assert page.locator(".strip.stale").count() == 0
    page.get_by_role("tab", name="Measure this").click()
    page.locator(".measure.stale").wait_for()


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_phones_and_desks_in_both_modes(browser, address, width, scheme):
    visitor = Visitor(
        browser, address, viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    for tab in ("Measure this", "Explore", "Pictures"):
        visitor.page.get_by_role("tab", name=tab).click()
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    paper = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(re.search(r"\d+", paper).group())
    assert red < 64 if scheme == "dark" else red > 192
    visitor.close()
