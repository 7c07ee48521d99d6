"""The error of what a user can fix."""


class UserError(ValueError):
    """Something the user can fix: an option, a file, a model, a device, a diverged training.

    The message names the thing, what was expected, what came and how to fix it. Parameters of the
    public API stand in backticks; the command line shows them as its own options. Every other
    exception is a fault of this package or of the machine, and keeps its traceback.
    """
