"""`respodiff push`."""

import argparse

SUMMARY = "upload an adapter to the Hugging Face hub"

DESCRIPTION = """\
Uploads an adapter directory with its card in one commit. Sign in first with `hf auth login`, or set
HF_TOKEN.
"""

EPILOG = """\
  respodiff push adapters/gender owner/respodiff-gender
  respodiff push adapters/gender owner/respodiff-gender --private
  respodiff push adapters/gender owner/respodiff-gender --revision draft
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="DIR", help="adapter directory")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository, made if it does not exist")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def run(args: argparse.Namespace) -> None:
    from respodiff_jax.adapters import hub

    print(hub.push(args.adapter, args.repo, revision=args.revision, private=args.private))
