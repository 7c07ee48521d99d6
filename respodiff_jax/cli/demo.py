"""`respodiff demo`."""

import argparse

SUMMARY = "train, measure and export on the bundled model, offline"

DESCRIPTION = """\
Trains "a woman" and "a man" on Emoji World, the small biased model in the package. Then it draws
people of twenty professions before and after, measures the pictures, exports the adapter and writes
a report. It downloads nothing. Run it again to continue after an interruption.
"""

EPILOG = """\
  respodiff demo --out demo

Then open demo/evaluation/report.html.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="respodiff-demo", metavar="DIR", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> None:
    from absl import logging

    from respodiff_jax.emoji import demo
    from respodiff_jax.training import distributed

    logging.set_verbosity(logging.FATAL)  # Orbax's threads log the errors that it then raises
    distributed.enable_compilation_cache()
    distributed.use_cores(demo.config().model.name, batch_size=2)  # one concept on each of two
    demo.run(args.out)
