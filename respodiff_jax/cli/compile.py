"""`respodiff compile`."""

import argparse
from collections.abc import Sequence
from functools import partial

from respodiff_jax.cli import inputs

SUMMARY = "compile for TPUs, without a TPU"
TAKES_OVERRIDES = True

DESCRIPTION = """\
Compiles the programs that `train` and `generate` run on a TPU slice, from shapes alone, on a
machine without a TPU. It reports for each chip: memory, and whether the program fits; FLOPs and
memory traffic, and which of them limits the speed; what the chips exchange. Nothing is run or
downloaded. A published model takes minutes. Needs libtpu: pip install -e ".[tpu]"

compile.json in --out keeps the results. A program with a result is not compiled again, except with
--cache. --config and --topology may be repeated; every pair is compiled.
"""

EPILOG = """\
The name of a slice is CHIP:SHAPE; the chips are v4, v5e, v5p and v6e:

  respodiff compile --config configs/sd14_gender.py --topology v5e:4x4 --batch-per-device 4 \\
      --config.model.name=random/sd14 --out compiled

random/sd14, random/sd21 and random/sdxl have the shapes of the published models, and need no files.
A table of several slices, and the largest batch that fits each:

  respodiff compile --config configs/sd14_gender.py --topology v5e:4x4 --topology v5p:2x2x1 \\
      --step train --largest-batch --batch-per-device 4 --table table.md --out compiled

A cache to copy to a pod. If all versions are the same there, `train` finds its step compiled (not
yet tried on a TPU):

  respodiff compile --config configs/sd14_gender.py --topology v5e:4x4 --batch-per-device 4 \\
      --cache cache --out compiled
  JAX_COMPILATION_CACHE_DIR=cache respodiff train ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--config",
        dest="configs",
        required=True,
        action="append",
        metavar="FILE",
        help="Python file with get_config(); may be repeated",
    )
    add("--concepts", metavar="FILE", help="concepts to use instead of the configs', as for train")
    add(
        "--topology",
        dest="topologies",
        required=True,
        action="append",
        metavar="CHIP:SHAPE",
        help="for example v5e:4x4; may be repeated",
    )
    add("--out", required=True, metavar="DIR", help="folder for compile.json")
    add(
        "--step",
        choices=("train", "sample", "both"),
        default="both",
        help="what to compile (default: %(default)s)",
    )
    add(
        "--batch-per-device",
        type=int,
        metavar="N",
        help="samples of each concept on a device (default: as config.train.batch_size gives)",
    )
    add(
        "--largest-batch",
        action="store_true",
        help="also find the largest --batch-per-device that fits; compiles a few more times",
    )
    add("--table", metavar="FILE", help="write all results in --out as a Markdown table")
    add("--cache", metavar="DIR", help="keep the compiled programs, for a pod's compilation cache")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from respodiff_jax.compiling import set_environment

    set_environment()  # before JAX is imported

    from respodiff_jax.compiling.ahead_of_time import compile_steps
    from respodiff_jax.training.config import load_config

    configs = [load_config(path, overrides, args.concepts) for path in args.configs]
    inputs.call(compile_steps, args, configs=configs, say=partial(print, flush=True))
