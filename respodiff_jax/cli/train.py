"""`respodiff train`."""

import argparse
from collections.abc import Sequence

from respodiff_jax.cli import inputs

SUMMARY = "train concepts"
TAKES_OVERRIDES = True

DESCRIPTION = """\
Trains RAM and SAM for the concepts of a config, on all local devices. Writes checkpoints, logs and
validation grids to the working directory, and the adapter at the end. After an interruption, run
the same command again to continue.

Many concepts come from a file, JSON lines or CSV, with one concept per line: name, group,
neutral_prompts, and target_prompt or unsafe_prompt. A line may also have guidance_scale,
lambda_sem, lr_ram and lr_sam; otherwise the config's concept_defaults apply. If there are more
concepts than --config.train.concepts_per_device on each device, they are trained in waves. Each
wave writes its adapter; outcomes.jsonl says where each concept is.

Ctrl-C and SIGTERM save and stop; a second Ctrl-C ends at once.

Exit status: 0, finished; 1, the machine failed; 2, a mistake, or all concepts diverged; 75,
interrupted and saved.
"""

EPILOG = """\
Change any option of the config with --config.SECTION.OPTION=VALUE:

  respodiff train --config configs/smoke.py --workdir runs/smoke
  respodiff train --config configs/sd14_gender.py --workdir runs/gender \\
      --config.train.steps=2000 --config.model.name=/models/stable-diffusion-v1-4

A thousand concepts, at most eight at a time on each device:

  respodiff train --config configs/sd14_gender.py --concepts concepts.jsonl --workdir runs/many \\
      --config.train.concepts_per_device=8

Several hosts, on TPU pods and under Slurm: run the same command on each.

  respodiff train --config configs/sdxl_gender.py --workdir /shared/run --distributed auto \\
      --config.train.batch_size=8

Several hosts anywhere, with process 0 on host0:

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
        help="working directory; an earlier run in it is continued",
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a profiler trace of a few steps"
    )
    hosts = parser.add_argument_group("several hosts")
    hosts.add_argument(
        "--distributed",
        choices=("auto",),
        help="let JAX find the other hosts (TPU pods, Slurm, Open MPI)",
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    hosts.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    hosts.add_argument(
        "--process-id", type=int, metavar="I", help="number of this process, 0 .. N-1"
    )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    inputs.check_file("--config", args.config)  # before the seconds that imports take

    from absl import logging

    import respodiff_jax as rd
    from respodiff_jax.training import distributed
    from respodiff_jax.training.waves import run_training

    logging.set_verbosity(logging.FATAL)  # Orbax's threads log the errors that it then raises
    config = rd.load_config(args.config, overrides, concepts=args.concepts)
    distributed.initialize(
        args.coordinator, args.num_processes, args.process_id, args.distributed == "auto"
    )
    distributed.enable_compilation_cache()
    if not (args.coordinator or args.distributed):
        distributed.use_cores(config.model.name, config.train.batch_size)
    with distributed.leaving_on_error():
        run_training(config, args.workdir, profile=args.profile)
