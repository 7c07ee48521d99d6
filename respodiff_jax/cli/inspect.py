"""`respodiff inspect`."""

import argparse

from respodiff_jax.cli import inputs
from respodiff_jax.errors import UserError

SUMMARY = "describe and check an adapter, and what it reads in prompts"

DESCRIPTION = """\
Prints kind, model and concepts of an adapter, and checks its files, shapes and numbers. With
prompts, prints what the adapter decides on each: `open` is steered, `named` and `nobody` are not.
No picture is drawn.
"""

EPILOG = """\
  respodiff inspect adapters/gender
  respodiff inspect runs/gender
  respodiff inspect owner/name@main
  respodiff inspect runs/gender --prompt "a photo of a doctor" --prompt "a photo of a cat"
  respodiff inspect runs/gender --prompts-file coco_30k.csv > decisions.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="adapter directory, training workdir or hub id"
    )
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    add(
        "--prompts-file",
        metavar="FILE",
        help="a prompt on each line, or a CSV file with the column prompt",
    )
    add("--model", metavar="NAME", help="diffusers folder or hub id (default: the adapter's)")


def run(args: argparse.Namespace) -> None:
    inputs.check_sources([args.adapter])
    if args.prompts_file:
        inputs.check_file("--prompts-file", args.prompts_file)

    import respodiff_jax as rd
    from respodiff_jax.adapters.card import describe
    from respodiff_jax.adapters.reading import decisions_table, reads_prompts

    adapter = rd.load_adapter(args.adapter)
    if not (args.prompt or args.prompts_file):
        if args.model:
            raise UserError("--model encodes prompts; give --prompt TEXT or --prompts-file FILE")
        print(describe(adapter))
        return
    prompts = inputs.read_prompts(args.prompt, args.prompts_file)
    if not reads_prompts(adapter):
        raise UserError(f"{args.adapter} reads no prompts: it steers each of them")
    print(decisions_table(adapter, rd.load_model(args.model, adapter=adapter), prompts))
