"""What a caller may want to tell apart: a user's mistake, and a training that was stopped."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The question "; did you mean 'a woman'?", or "" if nothing known is like the name."""
    known = {text.lower(): text for text in known}
    close = difflib.get_close_matches(name.lower(), known, 1) or [
        text for text in known if name.lower() in text.split()
    ]
    return f"; did you mean {known[close[0]]!r}?" if close else ""


class UserError(ValueError):
    """Something the user can fix: an option, a file, a model, a device, a diverged training.

    The message names the thing, what was expected, what came and how to fix it. Parameters of the
    public API stand in backticks; the command line shows them as its own options. Every other
    exception is a fault of this package or of the machine, and keeps its traceback.
    """


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises `UserError` unless the value of what is named is one of the choices."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f"{name} is {value!r:.80}, expected one of {', '.join(choices)}")


def check_least(name: str, value: int, least: int = 1) -> None:
    """Raises `UserError` unless the value of what is named is large enough."""
    if value < least:
        raise UserError(f"{name} is {value}, expected at least {least}")


def shortened(text: object, length: int = 100) -> str:
    """A text for a message: one line, cut off after so many characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


class Interrupted(Exception):
    """A training was stopped by SIGTERM, Ctrl-C or a preemption before its end.

    Its state is saved: the same call continues it, bit for bit. The command exits with status 75.

    Attributes:
      step: training steps done.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step
