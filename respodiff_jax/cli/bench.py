"""`respodiff bench`."""

import argparse
import os
from collections.abc import Sequence

from respodiff_jax.errors import UserError

SUMMARY = "measure speed, memory and compile time"
TAKES_OVERRIDES = True

DESCRIPTION = """\
Measures on this machine what a config costs:

  train       the training step: samples per second, UNet evaluations per sample (by FLOPs, against
              one forward pass of the UNet), FLOP utilisation, peak memory, compile time
  generate    sampling with the config's model, from prompts to images
  torch-train not a measurement: trains the config by the published procedure in PyTorch,
              whatever its rollout.kind, with its learning-rate schedule, and writes
              adapters, for `respodiff evaluate`

--against torch measures PyTorch on the same model in the same run, in turns: for train the
published procedure (a rollout for every sample), for generate diffusers' pipeline. A Markdown table
is printed, --out writes all numbers as JSON.
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
    parser.add_argument(
        "what", choices=("train", "generate", "torch-train"), help="what to measure"
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="Python file with get_config()"
    )
    parser.add_argument(
        "--concepts", metavar="FILE", help="concepts instead of the config's, as for train"
    )
    parser.add_argument("--against", choices=("torch",), help="measure this too, in turns")
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="of each side (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="FILE", help="JSON file with all numbers")
    parser.add_argument("--workdir", metavar="DIR", help="torch-train: new folder for adapters")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}, expected at least 1")
    if (args.what == "torch-train") != (args.workdir is not None):
        raise UserError("--workdir is where torch-train writes: give both or neither")
    if args.workdir and (args.out or args.against):
        raise UserError("torch-train measures nothing; drop --out and --against")
    if args.against or args.workdir:
        # JAX would take most of a GPU's memory at once and leave PyTorch none.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    from respodiff_jax.bench import published
    from respodiff_jax.bench.generate import bench_generate
    from respodiff_jax.bench.report import check_writable
    from respodiff_jax.bench.train import bench_train
    from respodiff_jax.training.config import load_config

    config = load_config(args.config, overrides, args.concepts)
    if args.workdir:
        print(f"adapter written to {published.train(config, args.workdir)}")
        return
    if args.out:
        check_writable(args.out)
    bench = bench_train if args.what == "train" else bench_generate
    report = bench(config, args.against == "torch", args.repeats)
    print(report)
    if args.out:
        report.write(args.out)
