"""`respodiff inspect`."""

import argparse

from respodiff_jax.cli import inputs

SUMMARY = "describe and check an adapter"

DESCRIPTION = """\
Prints kind, model and concepts of an adapter, and checks its files, shapes and numbers.
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
    inputs.check_sources([args.adapter])

    import respodiff_jax as rd
    from respodiff_jax.adapters.card import describe

    print(describe(rd.load_adapter(args.adapter)))
