"""What a caller may want to tell apart: a user's mistake, and a training that was stopped."""


class UserError(ValueError):
    """Something the user can fix: an option, a file, a model, a device, a diverged training.

    The message names the thing, what was expected, what came and how to fix it. Parameters of the
    public API stand in backticks; the command line shows them as its own options. Every other
    exception is a fault of this package or of the machine, and keeps its traceback.
    """


class Interrupted(Exception):
    """A training was stopped by SIGTERM or a preemption before its end.

    Its state is saved: the same call continues it, bit for bit. The command exits with status 75.

    Attributes:
      step: number of steps done.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step
