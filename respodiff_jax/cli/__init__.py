"""The command `respodiff VERB`. A module for each verb reads its options and calls the library.

JAX and the models are imported only when a verb runs, so `--help` answers at once.
"""

import argparse
import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from respodiff_jax.cli import (
    bench,
    compare,
    compile,
    demo,
    evaluate,
    export,
    generate,
    import_,
    inspect,
    play,
    push,
    train,
)
from respodiff_jax.errors import Interrupted, UserError, nearest

# The module of a verb has SUMMARY, DESCRIPTION, EPILOG, add_arguments(parser) and run(args). With
# TAKES_OVERRIDES, it has run(args, overrides).
_VERBS = {
    "demo": demo,
    "play": play,
    "train": train,
    "generate": generate,
    "evaluate": evaluate,
    "compare": compare,
    "export": export,
    "inspect": inspect,
    "import": import_,
    "push": push,
    "bench": bench,
    "compile": compile,
}

_DESCRIPTION = """\
Responsible text-to-image generation in JAX (RespoDiff): train small modules that steer a frozen
Stable Diffusion towards fair and safe pictures, and generate with them.
"""

_EPILOG = """\
A first look, without a download:

  respodiff play
  respodiff demo

From a config to pictures:

  respodiff train --config configs/sd14_gender.py --workdir runs/gender
  respodiff generate --adapter runs/gender --fair gender --prompt "a photo of a doctor" \\
      --images-per-prompt 8 --base --out pictures
  respodiff export runs/gender --out adapters/gender

`respodiff VERB --help` explains a verb.
"""

_OVERRIDE = "--config."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
      argv: the arguments; None takes those of this process.

    Returns:
      The exit status. 0: the command is finished. 2: a user's mistake, or all concepts of a
      training diverged; another start would fail again. 1: the machine failed, for example by a
      full disk. 75: a training was interrupted and has
      saved; the same command continues it. 130: Ctrl-C.

    Raises:
      SystemExit: from argparse, for `--help` (status 0) and for wrong options (status 2).
      Exception: any other error keeps its traceback, and Python exits with status 1.
    """
    # XLA would print "Very slow compile?" in the middle of the output.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        return 0
    args, rest = parser.parse_known_args(argv)
    verb = _VERBS[args.verb]
    takes_overrides = getattr(verb, "TAKES_OVERRIDES", False)
    overrides = [arg for arg in rest if arg.startswith(_OVERRIDE)]
    if unknown := [arg for arg in rest if arg not in overrides or not takes_overrides]:
        hint = "; write overrides as --config.SECTION.OPTION=VALUE" if overrides else ""
        options = [name for a in args.parser._actions for name in a.option_strings]
        hint = hint or nearest(unknown[0].partition("=")[0], options)
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if argv is None:
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        verb.run(args, overrides) if takes_overrides else verb.run(args)
    except UserError as error:
        print(f"respodiff: error: {_with_options(str(error), args.parser)}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"respodiff: {stop}; run the same command to continue", file=sys.stderr)
        return 75  # EX_TEMPFAIL
    except KeyboardInterrupt:
        print("respodiff: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not (failure := _failure_of_machine(error)):
            raise
        print(
            f"respodiff: error: {failure}; what was written stays. Free space or choose another"
            " folder, then run the same command again",
            file=sys.stderr,
        )
        return 1
    return 0


def _failure_of_machine(error: BaseException | None) -> str | None:
    """What the machine said, such as a full disk, if that is what an error comes from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
        if "No space left on device" in str(error):  # TensorStore's
            return "No space left on device"
        error = error.__cause__
    return None


def _with_options(message: str, parser: argparse.ArgumentParser) -> str:
    """Replaces each `parameter` in a library message by the command's option for it."""
    options = {a.dest: a.option_strings[0] for a in parser._actions if a.option_strings}
    return re.sub(r"`(\w+)`", lambda name: options.get(name[1], name[0]), message)


class _Parser(argparse.ArgumentParser):
    """Prints a mistake alone, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser("respodiff", description=_DESCRIPTION, epilog=_EPILOG, **style)
    version = importlib.metadata.version("respodiff-jax")
    parser.add_argument("--version", action="version", version=f"respodiff {version}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in _VERBS.items():
        verb = verbs.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            **style,
        )
        verb.set_defaults(parser=verb)
        module.add_arguments(verb)
    return parser
