"""`respodiff inspect`."""

import argparse

from respodiff_jax.cli import inputs

SUMMARY = "print what an adapter is"

DESCRIPTION = """\
Prints an adapter's kind, model and concepts, and checks the whole of it: files, shapes, numbers.
"""

EPILOG = """\
  respodiff inspect adapters/gender
  respodiff inspect runs/gender
  respodiff inspect owner/name@main
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="adapter directory, training workdir or hub id"
    )


def run(args: argparse.Namespace) -> None:
    from respodiff_jax.adapters.card import describe

    print(describe(inputs.open_adapter(args.adapter)))
