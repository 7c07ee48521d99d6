"""The playground on Emoji World: how fast it draws on this machine, and the memory that it takes.

pytest -m "slow and browser" tests/play -s
"""

import pathlib
import re
import statistics
import subprocess
import sys
import time

import pytest
from test_page import browser, in_browser  # noqa: F401

SUBJECTS = "a cook", "a pilot", "a judge", "a welder", "a singer", "a farmer", "a teacher", "a poet"
SOURCES = "all => all.filter(e => e.offsetParent).map(e => e.src)"
ALL_NEW = """before => {
    const all = [...document.querySelectorAll('.pair img')].filter(e => e.offsetParent);
    const done = document.querySelector('.status').innerText.trim().startsWith('done');
    return done && all.length == 16 && all.every(e => !before.includes(e.src));
}"""


@pytest.fixture
def played(monkeypatch):
    """The process of `respodiff play`, and the address of its page."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the tests simulate eight devices
    command = [sys.executable, "-m", "respodiff_jax", "play", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = next(line for line in iter(process.stdout.readline, "") if "open http" in line)
        yield process, line.split()[1]
        process.terminate()


def resident(process):
    """Memory of a process, MiB."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


@pytest.mark.slow
@in_browser
def test_forty_prompts_take_no_more_memory_than_two(played, browser):  # noqa: F811
    process, address = played
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(120_000)
    seconds, memory = [], []
    for i in range(41):
        before = page.eval_on_selector_all(".pair img", SOURCES) if i else []
        begin = time.perf_counter()
        if i:
            prompt = f"a photo of {SUBJECTS[i % 8]}{'!' * (i // 8)}"
            page.get_by_label("Prompt", exact=True).fill(prompt)
        else:
            page.goto(address)
        page.wait_for_function(ALL_NEW, arg=before)
        seconds.append(time.perf_counter() - begin)
        memory.append(resident(process))
    print(f"\nfirst eight pictures, before and after: {seconds[0]:.1f} s; forty further prompts:")
    print(f"median {statistics.median(seconds[1:]):.2f} s, slowest {max(seconds[1:]):.2f} s")
    print(f"memory: {memory[2]:.0f} MiB after two prompts, {memory[-1]:.0f} MiB after forty")
    assert memory[-1] - memory[2] < 64  # what the page keeps
