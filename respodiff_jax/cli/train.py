"""`respodiff train`."""

import argparse
from collections.abc import Sequence

SUMMARY = "train concepts"
TAKES_OVERRIDES = True

DESCRIPTION = """\
Trains RAM and SAM of the concepts that a config lists. The working directory gets checkpoints, logs
and sample grids, and at the end the adapter. Run the same command again to continue after an
interruption. All local devices are used.

Many concepts come from a file, JSON lines or CSV, a concept per line: name, group, neutral_prompts,
target_prompt or unsafe_prompt, and, where they differ from the config's concept_defaults,
guidance_scale, lambda_sem, lr_ram, lr_sam. More than --config.train.concepts_per_device on each
device are trained in waves, each of which leaves its adapter; outcomes.jsonl tells where each
concept is.
"""

EPILOG = """\
Any option of the config can be changed, as --config.SECTION.OPTION=VALUE:

  respodiff train --config configs/smoke.py --workdir runs/smoke
  respodiff train --config configs/sd14_gender.py --workdir runs/gender \\
      --config.train.steps=2000 --config.model.name=/models/stable-diffusion-v1-4

A thousand concepts, at most eight at a time on each device:

  respodiff train --config configs/sd14_gender.py --concepts concepts.jsonl --workdir runs/many \\
      --config.train.concepts_per_device=8

Several hosts run the same command each, on TPU pods and under Slurm:

  respodiff train --config configs/sdxl_gender.py --workdir /shared/run --distributed auto \\
      --config.train.batch_size=8

or anywhere, with process 0 on host0:

  respodiff train --config configs/sdxl_gender.py --workdir /shared/run \\
      --config.train.batch_size=8 --coordinator host0:1234 --num-processes 2 --process-id 0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="Python file with get_config()"
    )
    parser.add_argument(
        "--concepts",
        metavar="FILE",
        help="concepts to train instead of the config's: .jsonl, .csv or a prepared data set",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="of the run; an earlier run in it is continued",
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a profiler trace of a few steps"
    )
    hosts = parser.add_argument_group("several hosts")
    hosts.add_argument(
        "--distributed",
        choices=("auto",),
        help="find the other hosts by itself (TPU pods, Slurm, Open MPI)",
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    hosts.add_argument("--num-processes", type=int, metavar="N", help="processes in all")
    hosts.add_argument("--process-id", type=int, metavar="I", help="this process, 0 .. N-1")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    import respodiff_jax as rd
    from respodiff_jax.training import distributed

    config = rd.load_config(args.config, overrides, concepts=args.concepts)
    distributed.initialize(
        args.coordinator, args.num_processes, args.process_id, args.distributed == "auto"
    )
    distributed.enable_compilation_cache()
    with distributed.leaving_on_error():
        rd.train(config, args.workdir, profile=args.profile)
