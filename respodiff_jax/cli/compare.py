"""`respodiff compare`."""

import argparse

SUMMARY = "compare several evaluations"

DESCRIPTION = """\
Writes one self-contained page that compares several evaluations: every metric with its intervals,
pictures of the same professions one above the other, and the settings that differ.
"""

EPILOG = """\
  respodiff compare evaluations/gender-500 evaluations/gender-1000 --out comparison.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="two or more folders that `respodiff evaluate` wrote",
    )
    parser.add_argument(
        "--out",
        default="comparison.html",
        metavar="FILE",
        help="page to write (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    from respodiff_jax.evaluation import compare

    print(f"{compare(args.folders, args.out)}: {len(args.folders)} evaluations")
