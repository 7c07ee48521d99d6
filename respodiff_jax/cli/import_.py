"""`respodiff import`."""

import argparse

from respodiff_jax.cli import inputs

SUMMARY = "convert a checkpoint of the authors' code or of SDisc into an adapter"

DESCRIPTION = """\
Reads the modules of a `unet.pth` that the authors' RespoDiff code or SDisc saved, and writes an
adapter directory. Nothing pickled in the file is run. Needs PyTorch.

A checkpoint has a column for each concept id. Columns that were not trained hold noise: name only
trained concepts. The file of concept ids is JSON, {"a woman": 0, "a man": 1} for the paper's
concepts. Other concepts need their fields:

  {"a wizard": {"id": 7, "group": "job", "neutral_prompts": ["a person"],
                "target_prompt": "a wizard"}}
"""

EPILOG = """\
  respodiff import woman/unet.pth --concepts ids.json --only "a woman" --out adapters/woman
  respodiff import sdisc/unet.pth --concepts ids.json --out adapters/sdisc
  respodiff import unet.pth --concepts ids.json --model /models/sd15 --resolution 512 --out adapter
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="FILE", help="unet.pth")
    add("--concepts", required=True, metavar="FILE", help="concept ids, JSON")
    add(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="a concept to take (default: all); may be repeated",
    )
    add("--out", required=True, metavar="DIR", help="adapter directory to write")
    add(
        "--model",
        default="CompVis/stable-diffusion-v1-4",
        metavar="NAME",
        help="model of the training, diffusers folder or hub id (default: %(default)s)",
    )
    add("--revision", help="branch, tag or commit of a hub id")
    add("--variant", help="variant of the weight files, for example fp16")
    add(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="resolution of the training (default: the model's)",
    )


def run(args: argparse.Namespace) -> None:
    inputs.check_file("checkpoint", args.checkpoint)  # before the hub is asked for the model
    inputs.check_file("--concepts", args.concepts)

    import respodiff_jax as rd

    adapter = inputs.call(rd.import_checkpoint, args)
    rd.export(adapter, args.out)
    print(f"{args.out}: adapter of {', '.join(adapter.names)}")
