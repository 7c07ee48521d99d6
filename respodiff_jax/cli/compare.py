"""`respodiff compare`."""

import argparse

from respodiff_jax.errors import UserError

SUMMARY = "put several evaluations side by side"

DESCRIPTION = """\
Writes one self-contained page about several evaluations: every metric with its intervals, pictures
of the same professions one above the other, and which settings differ.
"""

EPILOG = """\
  respodiff compare evaluations/gender-500 evaluations/gender-1000 --out comparison.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "evaluations", nargs="+", metavar="DIR", help="what `respodiff evaluate` wrote; two or more"
    )
    parser.add_argument(
        "--out", default="comparison.html", metavar="FILE", help="page (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    from respodiff_jax.evaluation.report import write_comparison

    try:
        path = write_comparison(args.evaluations, args.out)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error}") from error
    print(f"{path}: {len(args.evaluations)} evaluations")
