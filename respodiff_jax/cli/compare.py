"""`respodiff compare`."""

import argparse

SUMMARY = "compare several evaluations"

DESCRIPTION = """\
Writes one self-contained page that compares several evaluations. It begins with the finding: which
one is better on each headline metric, by how much, and whether the intervals overlap. Below are
all metrics, pictures of the same professions one above the other, and the settings that differ.
"""

EPILOG = """\
  respodiff compare evaluations/gender-500 evaluations/gender-1000 --out comparison.html
  respodiff compare evaluations/gender-500 evaluations/gender-1000 --name short --name long
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="two or more folders that `respodiff evaluate` wrote",
    )
    parser.add_argument(
        "--name",
        action="append",
        dest="names",
        metavar="NAME",
        help="what the page calls an evaluation; give it once for each, in their order (default:"
        " what differs in their paths)",
    )
    parser.add_argument(
        "--out",
        default="comparison.html",
        metavar="FILE",
        help="page to write (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    from respodiff_jax.evaluation import compare

    print(f"{compare(args.folders, args.out, args.names)}: {len(args.folders)} evaluations")
