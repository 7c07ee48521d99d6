"""Progress in a log file: whole lines, no carriage returns."""

import io
import time

from respodiff_jax import progress
from respodiff_jax.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_log_file_gets_lines_and_a_terminal_a_bar(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", log)
    monkeypatch.setattr(progress.sys, "stdout", log)
    with Progress(total=6, desc="wave 1", unit="step") as bar:
        for step in range(6):
            bar.set_postfix_str(f"L {step}", refresh=False)
            bar.update()
            bar.write(f"said {step}")
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and "" not in lines
    assert [line for line in lines if line.startswith("said")] == [f"said {i}" for i in range(6)]
    bars = [line for line in lines if line.startswith("wave 1: ")]
    assert len(bars) == 1  # the steps took less than LINE_SECONDS
    assert "100% 6/6" in bars[0] and "L 5" in bars[0]

    log.truncate(0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    for _ in Progress(range(10), "slow"):
        time.sleep(0.04)
    assert 3 <= log.getvalue().count("slow: ") <= 9  # about every 0.05 of 0.4 seconds

    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    assert list(Progress(range(3), "clip")) == [0, 1, 2]
    assert "\r" in terminal.getvalue() and "100%|" in terminal.getvalue()
