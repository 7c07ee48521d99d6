"""`respodiff compile`."""

import argparse
import os
from collections.abc import Sequence

from respodiff_jax.errors import UserError

SUMMARY = "compile for a TPU that is not there"
TAKES_OVERRIDES = True

DESCRIPTION = """\
Compiles what `train` and `generate` would run on a TPU slice, on a machine without a TPU and from
shapes alone, and says what it takes of each chip: memory, and whether that fits; arithmetic and
memory traffic, and which of them binds at best; what the chips exchange. Nothing is run or fetched.
A published model takes minutes. Needs libtpu: pip install -e ".[tpu]"

--out has compile.json, with what was compiled; it is not compiled again unless --cache is given.
--config and --topology may be repeated: all pairs are compiled.
"""

EPILOG = """\
Slices are named CHIP:SHAPE, with the chips v4, v5e, v5p and v6e:

  respodiff compile --config configs/sd14_gender.py --topology v5e:4x4 --batch-per-device 4 \\
      --config.model.name=random/sd14 --out compiled

random/sd14, random/sd21 and random/sdxl have the shapes of the published models, and need no files.
A table of several slices, and the largest batch that fits each:

  respodiff compile --config configs/sd14_gender.py --topology v5e:4x4 --topology v5p:2x2x1 \\
      --step train --largest-batch --batch-per-device 4 --table table.md --out compiled

A cache to copy to the pod, whose `train` then need not compile the step, if all versions are the
same (that it finds the programs there can be seen only on a TPU):

  respodiff compile --config configs/sd14_gender.py --topology v5e:4x4 --batch-per-device 4 \\
      --cache cache --out compiled
  JAX_COMPILATION_CACHE_DIR=cache respodiff train ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--config",
        required=True,
        action="append",
        metavar="FILE",
        help="Python file with get_config(); may be repeated",
    )
    add("--concepts", metavar="FILE", help="concepts instead of the configs', as for train")
    add(
        "--topology",
        required=True,
        action="append",
        metavar="CHIP:SHAPE",
        help="for example v5e:4x4; may be repeated",
    )
    add("--out", required=True, metavar="DIR", help="of compile.json")
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
        help="samples of each concept on a device (default: of config.train.batch_size)",
    )
    add(
        "--largest-batch",
        action="store_true",
        help="also find the largest batch per device that fits, by compiling a few",
    )
    add("--table", metavar="FILE", help="write all results of --out as a Markdown table")
    add("--cache", metavar="DIR", help="keep the compiled programs, for a pod's compilation cache")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    if args.batch_per_device is not None and args.batch_per_device < 1:
        raise UserError(f"--batch-per-device is {args.batch_per_device}, expected at least 1")
    # Before JAX is imported: it shall look neither for a TPU nor for its metadata server; libtpu
    # shall not complain that nothing tells it of a host and its chips, for which any kind will do;
    # and no weights shall be fetched for the sake of their shapes.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}

    from respodiff_jax.compiling import report
    from respodiff_jax.compiling import run as compiling
    from respodiff_jax.storage import local_path
    from respodiff_jax.training.config import load_config

    table = args.table and local_path(args.table, "--table")
    configs = [load_config(path, overrides, args.concepts) for path in args.config]
    steps = compiling.STEPS if args.step == "both" else (args.step,)
    steps += (compiling.LARGEST,) * args.largest_batch
    jobs = [
        compiling.Job(config, topology, step, args.batch_per_device)
        for config in configs
        for topology in args.topology
        for step in steps
    ]
    if args.cache:
        compiling.keep_compiled(args.cache)
    for entry in compiling.compile_jobs(jobs, args.out, again=bool(args.cache)):
        print(report.summary(entry), flush=True)
    if table:
        results = compiling.read_results(local_path(args.out, "--out") / compiling.RESULTS_FILE)
        try:
            table.write_text(report.markdown(results), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--table {args.table} cannot be written: {error}") from error
        print(f"{args.table}: {len(results)} results")
