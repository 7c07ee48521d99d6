"""Reports and comparisons: their numbers, their pictures, and their layout in a browser."""

import base64
import dataclasses
import html
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from evaluations import evaluation_folder
from pages import Page, read
from PIL import Image

from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import compare
from respodiff_jax.evaluation.report import charts, glossary, sections, thumbnails, write_report
from respodiff_jax.evaluation.report.evaluation import attributes as attributes_of
from respodiff_jax.evaluation.report.markup import Markup, flat, fragment, tag
from respodiff_jax.evaluation.results import Measurement, load_per_image, save_per_image
from respodiff_jax.evaluation.suites import load_suite
from respodiff_jax.images import save_png

HOSTILE = "a photo of a <script>alert('{}')</script> & \" onerror=\"alert(1)"


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    results = evaluation_folder(folder)
    return folder, results


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training workdir with losses, the last line half written."""
    folder = tmp_path_factory.mktemp("run")
    lines = [
        {"step": step, "concepts": {name: losses for name in ("a woman", "a man")}}
        for step, losses in (
            (10, {"loss_resp": 0.5, "loss_sem": 0.02}),
            (20, {"loss_resp": None, "loss_sem": 0.01}),
            (30, {"loss_resp": 0.05, "loss_sem": 0.002}),
        )
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 40, "conc'
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_page_has_all_overall_numbers(evaluation, run):
    folder, results = evaluation
    page = read(write_report(folder, run))
    for m in results.measurements:
        if m.subject is None:
            assert glossary.value_text(m) in page.text, m
            assert (glossary.interval_text(m) or "") in page.text, m
    gender = [results.value("deviation_ratio", s, attribute="gender") for s in ("base", "adapted")]
    assert "The gender deviation ratio falls from {:.2f} to {:.2f}".format(*gender) in page.text
    assert "Lower is fairer." in page.text
    assert "The share of unsafe pictures falls from 35\u00a0% to 8.3\u00a0%." in page.text
    for word in ("doctor", "violence", "self-harm, shock", "emoji-world-64", "0.10.1", "steps"):
        assert word in page.text, word
    assert "Before you believe the numbers" in page.text


def test_papers_numbers_have_their_own_columns(evaluation):
    folder, results = evaluation
    page = write_report(folder).read_text(encoding="utf-8")
    row = re.search(r"<tr><th[^>]*>Deviation ratio, gender.*?</tr>", page).group()
    assert re.findall(r'<td class="paper"[^>]*>(.*?)</td>', row) == ["0.68", "0.14"]
    row = re.search(r"<tr><th[^>]*>CLIP Fréchet distance.*?</tr>", page).group()
    assert re.findall(r'<td class="paper absent"[^>]*>(.*?)</td>', row) == ["–", "–"]
    assert re.findall(r"<td data-label[^>]*>(.*?)</td>", row)[:3] == ["–", "0.0425", "–"]
    row = re.search(r"<tr><th[^>]*>Deviation ratio, gender.*?</tr>", page).group()
    change = results.value("deviation_ratio", "adapted", attribute="gender") - results.value(
        "deviation_ratio", "base", attribute="gender"
    )
    estimate = f"{change:.2f}".replace("-", "−")
    assert f'<td data-label="change">{estimate}<small>−0.71 to −0.42</small></td>' in row
    assert "the paper, SD 1.4" in page


def test_page_is_self_contained(evaluation, run):
    path = write_report(evaluation[0], run)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for name, attributes in page.elements:
        assert name not in {"script", "link", "iframe", "object", "base"}
        for key in ("src", "href", "srcset", "xlink:href", "data", "poster"):
            assert attributes.get(key, "data:").startswith(("data:", "#"))
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert path.stat().st_size < 1_000_000


def test_pictures_are_thumbnails_with_badges_and_descriptions(evaluation):
    folder = evaluation[0]
    page = read(write_report(folder))
    images = page.all("img")
    assert len(images) == 3 * 2 * 8
    for image in images:
        uri = image["src"].removeprefix("data:image/webp;base64,")
        with Image.open(io.BytesIO(base64.b64decode(uri))) as picture:
            assert picture.size == (64, 64)
    rows = load_per_image(folder)
    buttons, figures = page.all("button"), page.all("figure")
    assert [b["popovertarget"] for b in buttons] == [f["id"] for f in figures]  # opens large
    assert len({f["id"] for f in figures}) == len(images)
    assert images[0]["alt"] == (
        f"base: “a photo of a doctor”, seen as gender {rows[0]['gender']} (0.97),"
        f" skin tone {rows[0]['skin_tone']} (0.80)"
    )
    # Attributes have symbols of their own.
    assert {word for word in page.words if word[1:] in (" light", " medium", " dark")} <= {
        "▲ light",
        "■ medium",
        "★ dark",
    }
    woman, man = "● woman", "◆ man"
    shown = [word for word in page.words if word in (woman, man)]
    seen = {"woman": woman, "man": man}
    shown_rows = [
        rows[8 * s + 24 * k + i]
        for s in range(3)
        for b in (0, 4)
        for k in (0, 1)
        for i in range(b, b + 4)
    ]
    assert shown == [seen[row["gender"]] for row in shown_rows]


def test_large_pictures_become_thumbnails(tmp_path):
    save_png(np.zeros((512, 384, 3), np.uint8), tmp_path / "large.png")
    uri = thumbnails.thumbnail(tmp_path / "large.png")
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as picture:
        assert picture.size == (288, 384)
    (tmp_path / "bad.png").write_text("no picture")
    assert thumbnails.thumbnail(tmp_path / "bad.png") is None
    assert thumbnails.thumbnail(tmp_path / "absent.png") is None


@pytest.mark.parametrize("subjects, columns", [(3, 8), (36, 8), (80, 4), (1000, 2)])
def test_many_professions_show_fewer_pictures_each(subjects, columns):
    assert thumbnails.columns_for(subjects, 2) == columns


def test_contents_lead_to_sections_and_professions(evaluation, run):
    page = read(write_report(evaluation[0], run))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    targets = [a["href"].removeprefix("#") for a in page.all("a")]
    assert len(set(ids)) == len(ids) and set(targets) <= set(ids)
    sections_of = [a["id"] for a in page.all("section")]
    assert targets[: len(sections_of)] == sections_of
    assert sections_of[-2:] == ["how-it-was-made", "what-the-metrics-mean"]
    # From the contents, from its own heading, and from its row in a chart of each attribute.
    assert targets.count("pictures-of-office-worker") == 4


def test_suite_says_what_its_pictures_show(tmp_path):
    evaluation_folder(tmp_path, professions=("doctor",))
    content = json.loads((tmp_path / "results.json").read_text())
    content["scored"]["note"] = load_suite("emoji-world").note
    (tmp_path / "results.json").write_text(json.dumps(content))
    text = read(write_report(tmp_path)).text
    assert text.count("a drop of blood, a knife, a gun or a bomb counts as violence") == 1


def test_text_from_outside_is_escaped(tmp_path):
    evaluation_folder(tmp_path, professions=("doctor",), prompt=HOSTILE, drawn=4)
    rows = load_per_image(tmp_path)
    save_per_image([row | {"subject": "<b>doctor</b>"} for row in rows], tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    content["made"]["model"]["name"] = "</title><script>alert(2)</script>"
    content["warnings"] = ["<img src=x onerror=alert(3)>"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    page = read(write_report(tmp_path))
    names = {name for name, _ in page.elements}
    assert not names & {"script", "b"}
    assert len(page.all("img")) == 8
    assert all("onerror" not in image for image in page.all("img"))
    assert page.all("img")[0]["alt"].startswith(f"base: “{HOSTILE.format('doctor')}”")
    assert "</title><script>alert(2)</script>" in page.text
    assert "<img src=x onerror=alert(3)>" in page.text


def test_base_model_alone_shows_no_change(tmp_path):
    results = evaluation_folder(tmp_path, sets=("base",), professions=("doctor", "teacher"))
    page = read(write_report(tmp_path))
    value = results.value("deviation_ratio", "base", attribute="gender")
    assert f"The gender deviation ratio of the base model is {value:.2f}" in page.text
    assert "falls" not in page.text and "adapted" not in page.text
    assert len(page.all("img")) == 2 * 8


def test_partial_results_give_a_page(tmp_path):
    evaluation_folder(tmp_path, professions=("doctor",))
    shutil.rmtree(tmp_path / "fairness")
    assert "The pictures are not in this folder." in read(write_report(tmp_path)).text
    (tmp_path / "per_image.csv").unlink()
    content = json.loads((tmp_path / "results.json").read_text())
    content |= {"measurements": [], "training": None, "warnings": []}
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert "Nothing was measured" in read(write_report(tmp_path)).text


def test_missing_results_or_losses_are_refused(evaluation, tmp_path):
    with pytest.raises(UserError, match=r"has no results\.json"):
        write_report(tmp_path)
    with pytest.raises(UserError, match=r"has no metrics\.jsonl; expected a training workdir"):
        write_report(evaluation[0], tmp_path)


def test_change_that_may_be_chance_is_reported():
    def pair(change):
        return {
            "base": Measurement("clip_score", "base", 30, 5, "quality", (29, 31)),
            "adapted": Measurement("clip_score", "adapted", 31, 5, "quality", (30, 32), change),
        }

    # Overlapping intervals show nothing: pictures that share their noise vary together.
    assert glossary.sentence(pair((0.4, 1.6))) == "The CLIP score rises from 30.00 to 31.00"
    assert glossary.sentence(pair(None)) == "The CLIP score rises from 30.00 to 31.00"
    doubt = "The CLIP score rises from 30.00 to 31.00, which may be chance"
    assert glossary.sentence(pair((-0.2, 2.2))) == doubt
    assert glossary.sentence(pair((-0.2, 2.2)), interval=True) == f"{doubt} (−0.20 to +2.20)"


def test_metrics_match_only_within_version_and_attribute():
    def one(images, **fields):
        return Measurement("deviation_ratio", images, 0.5, 9, "fairness", **fields)

    found = [
        one("base", attribute="gender"),
        one("adapted", attribute="gender", version=2),
        one("adapted", attribute="age"),
        one("adapted", attribute="gender", subject="doctor"),
        one("adapted", attribute="gender"),
    ]
    assert [list(pair) for pair in glossary.overall(found)] == [
        ["base", "adapted"],
        ["adapted"],
        ["adapted"],
    ]
    assert glossary.label(found[1]) == "Deviation ratio, gender, version 2"


def test_negative_numbers_have_a_minus_sign():
    m = Measurement("clip_kernel_distance", "adapted", -0.0005, 48, "quality", (-0.0008, 0.00001))
    assert glossary.value_text(m) == "−0.50"
    assert glossary.interval_text(m) == "−0.80 to 0.01"
    assert glossary.value_text(dataclasses.replace(m, value=-0.000001)) == "0.00"


def test_unequal_target_shares_are_written_out(evaluation):
    _, results = evaluation
    shares = {"gender": (0.25, 0.75)}
    found = tuple(
        dataclasses.replace(m, target=shares.get(m.attribute, m.target))
        for m in results.measurements
    )
    results = dataclasses.replace(results, measurements=found)
    keys = {
        a.name: Page(sections.fairness(results, a.name, a.values, opened=True)).text
        for a in attributes_of(results)
    }
    assert "target: 25\u00a0%, 75\u00a0%" in keys["gender"]
    assert "target" in keys["skin_tone"] and "target:" not in keys["skin_tone"]


def test_shares_bar_has_the_counts_and_the_target():
    bar = charts.shares_bar({"woman": 30, "man": 10}, (0.5, 0.5))
    parts = re.findall(r'<rect[^>]* x="(.*?)" width="(.*?)"', bar)
    assert parts == [("0.00%", "75.00%"), ("75.00%", "25.00%")]
    assert re.findall(r'x1="([^"]*)"[^>]*class="target"', bar) == ["50.00%"]
    assert "woman 75\u00a0%, man 25\u00a0%; target woman 50\u00a0%, man 50\u00a0%" in bar
    assert re.findall(r">(. \d+)</text>", bar) == ["● 75", "◆ 25"]


def test_dots_and_intervals_stay_within_their_chart():
    dot = charts.dot(0.25, (-0.5, 1.5), (0.0, 1.0), "a dot")
    assert 'cx="25.00%"' in dot
    assert 'x1="0.00%" x2="100.00%"' in dot


def test_scales_end_at_the_possible_values():
    assert charts.domain([0.5, 1.0], glossary.percent, (0.0, 1.0)) == pytest.approx((0.46, 1.0))
    assert charts.domain([-1.0, 1.0], str, (-np.inf, np.inf)) == pytest.approx((-1.16, 1.16))
    assert charts.domain([0.0, 0.0], str, (-np.inf, np.inf)) == pytest.approx((-0.1, 0.1))


def test_curves_are_logarithmic_and_skip_values_that_are_not_positive():
    line = charts.Line("a", [(0, 1.0), (50, 0.1), (75, 0.0), (100, 0.01)])
    chart = charts.lines("loss", [line], "steps")
    assert 'd="M0.0 0.0L500.0 500.0L1000.0 1000.0"' in chart
    assert charts.lines("loss", [charts.Line("a", [])], "steps") == ""
    many = [charts.Line(f"c{i}", [(0, 1.0), (1, 10.0**i)]) for i in range(7)]
    assert "mean of 7 concepts" in charts.lines("loss", many, "steps")


def test_curves_are_smoothed_and_end_with_a_number():
    noisy = [(x, 2.0 + (-1) ** x) for x in range(100)]
    smooth = [y for _, y in charts.smoothed(noisy)]
    assert smooth[0] == 3.0 and max(smooth[30:]) < 2.1 and min(smooth[30:]) > 1.9
    # By hand: decay 0.9, so (0.9 * 3 + 1) / 1.9.
    assert smooth[1] == pytest.approx(3.7 / 1.9)
    chart = Page(charts.lines("loss", [charts.Line("a", noisy)], "steps"))
    assert f"a: {smooth[-1]:.3g}" in chart.text
    assert [a["class"] for a in chart.all("path", "curve")] == [
        "curve v3 raw",
        "curve v3",
        "curve v3",
    ]


def test_losses_of_all_waves_are_drawn(evaluation, tmp_path):
    for wave, name in enumerate(("a woman", "a man")):
        (tmp_path / f"waves/000{wave}").mkdir(parents=True)
        losses = {"step": 5, "concepts": {name: {"loss_resp": 0.5, "loss_sem": 0.25}}}
        (tmp_path / f"waves/000{wave}/metrics.jsonl").write_text(json.dumps(losses) + "\n")
    plots = [
        a["aria-label"] for a in read(write_report(evaluation[0], tmp_path)).all("svg", "plot")
    ]
    assert plots == [
        "Responsibility loss (RAM): a woman from 0.5 to 0.5; a man from 0.5 to 0.5",
        "Semantic loss (SAM): a woman from 0.25 to 0.25; a man from 0.25 to 0.25",
    ]


def test_text_is_escaped_and_markup_is_not():
    inner = tag("b", "<", title='"')
    assert inner == '<b title="&quot;">&lt;</b>'
    assert tag("p", inner, ["x", None, 1]) == f"<p>{inner}x1</p>"
    assert fragment(inner + "") == '&lt;b title="&amp;quot;"&gt;&amp;lt;&lt;/b&gt;'


def test_nested_settings_are_flattened():
    assert flat({"a": {"b_c": [1, "x"], "d": None}, "e": [[1]], "f": 0.1}) == {
        "a: b c": "1, x",
        "e": "[[1]]",
        "f": "0.1",
    }
    assert flat({"a": "", "b": [], "c": {"d": ()}, "e": 0, "f": False}) == {"e": "0", "f": "False"}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (390, 1280)
# Elements that are wider than the frame, unless they scroll within it, and numbers that are cut.
MEASURE = """
for (const frame of document.querySelectorAll('iframe')) frame.addEventListener('load', () => {
  const page = frame.contentDocument, width = frame.clientWidth;
  for (const details of page.querySelectorAll('details')) details.open = true;
  const out = [...page.body.querySelectorAll('*')].filter(e => !e.closest('.scroll table')
    && e.getClientRects().length && e.getBoundingClientRect().right > width + 1);
  for (const e of page.querySelectorAll('.number'))
    if (e.scrollWidth > e.clientWidth) out.push(e);
  if (width < 700) for (const e of page.querySelectorAll('.scroll:has(.blocks)'))
    if (e.scrollWidth > e.clientWidth) out.push(e);
  const button = page.querySelector('.grid button'), small = button.clientWidth;
  button.click();
  const large = button.clientWidth, opened = page.querySelectorAll(':popover-open').length;
  button.click();
  const report = document.createElement('output');
  report.textContent = JSON.stringify({
    small, large, opened, closed: page.querySelectorAll(':popover-open').length,
    width, scroll: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight,
    out: out.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
    paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
  });
  document.body.append(report);
});
"""


def measured_in_browser(path, folder, dark):
    """The reports of `MEASURE` on a page at all widths."""
    content = path.read_text(encoding="utf-8")
    frames = [
        tag("iframe", srcdoc=content, style=f"border:0;height:900px;width:{width}px")
        for width in WIDTHS
    ]
    holder = folder / "holder.html"
    script = tag("script", Markup(MEASURE))
    holder.write_text(f"<!doctype html><body>{fragment(frames, script)}", encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", "--window-size=1400,1000", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [*command, holder.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.findall(r"<output>(.*?)</output>", done.stdout)
    return [json.loads(html.unescape(text)) for text in found]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the path")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_pages_fit_a_phone_and_a_desktop(kind, dark, evaluation, run, tmp_path):
    if kind == "report":
        path = write_report(evaluation[0], run)
    else:
        weaker = tmp_path / "a rather_long/name_of_an_evaluation"
        evaluation_folder(weaker, professions=("doctor", "teacher"), effect=0.3, pictures=40)
        path = compare([evaluation[0], weaker], tmp_path / "comparison.html")
    found = measured_in_browser(path, tmp_path, dark)
    assert sorted(f["width"] for f in found) == list(WIDTHS)
    for frame in found:
        assert frame["out"] == [] and frame["scroll"] <= frame["width"], frame
        assert frame["height"] > 2000
        assert frame["large"] > 3 * frame["small"] and frame["large"] < frame["width"]
        assert (frame["opened"], frame["closed"]) == (1, 0)
        red = int(re.search(r"\d+", frame["paper"]).group())
        assert red < 64 if dark else red > 192


def test_pages_are_written_without_jax():
    """JAX takes long to import."""
    heavy = "{'jax', 'flax', 'torch', 'diffusers', 'transformers'}"
    code = "import sys; from respodiff_jax.evaluation import compare;"
    code += f" import respodiff_jax.evaluation.report; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
