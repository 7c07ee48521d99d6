"""`respodiff bench`."""

import argparse
from collections.abc import Sequence

from respodiff_jax.cli import inputs
from respodiff_jax.errors import UserError

SUMMARY = "measure speed, memory and compile time"
TAKES_OVERRIDES = True

DESCRIPTION = """\
Measures a config on this machine:

  train       the training step: samples per second, UNet evaluations per sample (by FLOPs, relative
              to one forward pass of the UNet), FLOP utilisation, peak memory, compile time
  generate    sampling with the config's model, from prompts to images
  torch-train trains the config by the published procedure in PyTorch and writes adapters for
              `respodiff evaluate`; it follows the config's learning-rate schedule, ignores
              rollout.kind, and measures nothing

--against torch also measures PyTorch on the same model in the same run, in alternation. For train
that is the published procedure (a rollout for every sample), for generate diffusers' pipeline. The
command prints a Markdown table; --out writes all numbers as JSON.
"""

EPILOG = """\
  respodiff bench train --config configs/emoji_gender.py --against torch --out train.json
  respodiff bench train --config configs/sd14_gender.py --config.model.name=random/sd14
  respodiff bench generate --config configs/emoji_gender.py --against torch \\
      --config.train.batch_size=16 --config.log.grid_steps=50
  respodiff bench torch-train --config configs/emoji_gender.py --workdir runs/torch
  respodiff evaluate fairness --adapter runs/torch/000400 --out evaluations/torch

random/sd14, random/sd21 and random/sdxl are the published architectures with random weights.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "what", choices=("train", "generate", "torch-train"), help="what to measure, or torch-train"
    )
    add("--config", required=True, metavar="FILE", help="Python file with get_config()")
    add("--concepts", metavar="FILE", help="concepts to use instead of the config's, as for train")
    add("--against", choices=("torch",), help="also measure this, in alternation")
    add(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="repetitions of each side (default: %(default)s)",
    )
    add("--out", metavar="FILE", help="JSON file for all numbers")
    add("--workdir", metavar="DIR", help="new folder for the adapters of torch-train")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    torch_train = args.what == "torch-train"
    if torch_train != (args.workdir is not None):
        raise UserError("--workdir is for torch-train, which needs it: give both or neither")
    if torch_train and (args.out or args.against):
        raise UserError("torch-train measures nothing; drop --out and --against")

    from respodiff_jax.training.config import load_config

    config = load_config(args.config, overrides, args.concepts)
    if torch_train:
        from respodiff_jax.bench.published import train

        print(f"adapter written to {train(config, args.workdir)}")
    else:
        from respodiff_jax.bench.benchmark import benchmark

        print(inputs.call(benchmark, args, config=config))
