"""`respodiff compare`."""

import argparse

SUMMARY = "put several evaluations side by side"

DESCRIPTION = """\
Writes one self-contained page about several evaluations: every metric with its intervals, pictures
of the same professions one above the other, and the settings that differ.
"""

EPILOG = """\
  respodiff compare evaluations/gender-500 evaluations/gender-1000 --out comparison.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="folder of `respodiff evaluate`; two or more"
    )
    parser.add_argument(
        "--out", default="comparison.html", metavar="FILE", help="page (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    from respodiff_jax.evaluation import compare

    print(f"{compare(args.folders, args.out)}: {len(args.folders)} evaluations")
