"""Progress bars on a terminal, and lines in a log file."""

import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30


class Progress(tqdm):
    """A tqdm bar; where no terminal shows it, a line every `LINE_SECONDS` and one at the end.

    tqdm's own bar would fill a log file with carriage returns.
    """

    def __init__(self, *args: Any, **options: Any):
        self._lines = not sys.stderr.isatty()
        if self._lines:
            often = dict.fromkeys(("mininterval", "maxinterval", "delay"), LINE_SECONDS)
            options |= often | {"ncols": 0}  # figures without a bar
        super().__init__(*args, **options)

    @staticmethod
    def status_printer(file: Any) -> Any:
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: text.strip() and print(text.strip(), file=file, flush=True)

    @classmethod
    def write(cls, text: str, file: Any = None, **options: Any) -> None:
        """Prints a line above the bars, or in the log file; no line repeats a bar after it."""
        if sys.stderr.isatty():
            super().write(text, file, **options)
        else:
            print(text, file=file or sys.stdout, flush=True)

    def clear(self, *args: Any, **options: Any) -> None:
        if not self._lines:
            super().clear(*args, **options)

    def close(self) -> None:
        if not self._lines or self.disable:
            super().close()
            return
        self.display()
        self.disable = True
        self._decr_instances(self)
