"""`respodiff demo`."""

import argparse

SUMMARY = "the whole job on the embedded model, offline"

DESCRIPTION = """\
Trains "a woman" and "a man" on Emoji World, the small biased model that comes with the package,
draws people of twenty professions before and after, measures, exports the adapter and writes a
report to look at. Nothing is downloaded. Run it again to continue after an interruption.
"""

EPILOG = """\
  respodiff demo --out demo

then open demo/evaluation/report.html.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="respodiff-demo", metavar="DIR", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> None:
    from respodiff_jax.emoji import demo
    from respodiff_jax.training import distributed

    distributed.enable_compilation_cache()
    demo.run(args.out)
