"""Training all concepts of a config: in one run or, if they are many, in waves of runs.

Each wave is a run of its own in `waves/0000`, `waves/0001`, ... of the working directory, with its
`run.json`, checkpoints, logs and, at its end, its adapter. All waves have the same number of
concepts, so one compiled step serves all. With at least as many concepts as devices, each device
trains the same number; copies of the last concept fill up the rest and are dropped. If
`concepts_per_device` allows all concepts at once, there is a single run, in the working directory
itself.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from respodiff_jax.adapters import Adapter
from respodiff_jax.errors import Interrupted, UserError
from respodiff_jax.storage import open_path
from respodiff_jax.training.config import concepts_from, validate, with_concepts
from respodiff_jax.training.distributed import Preemption
from respodiff_jax.training.lock import locked
from respodiff_jax.training.outcomes import (
    has_waves,
    outcomes_of,
    read_outcomes,
    read_waves,
    write_outcomes,
    write_waves,
)
from respodiff_jax.training.parallel import Placement
from respodiff_jax.training.record import RUN_FILE, check_same_config, describes
from respodiff_jax.training.run import Run, open_session, say, train_run
from respodiff_jax.training.trained import load_adapter


def train(config: ConfigDict, workdir: epath.PathLike, *, profile: bool = False) -> Adapter:
    """Trains a config's concepts by Algorithm 1, from where the working directory stands.

    More concepts than `train.concepts_per_device` allows at a time are trained in waves. A concept
    whose loss, modules or optimiser states are no longer finite is reported and dropped; the others
    continue.

    Args:
      config: as from `load_config`.
      workdir: directory of the training, made if needed; local or on gs://.
      profile: also write a trace of a few steps to `profile/` in the working directory or, with
        waves, in the folder of the first wave that is trained.

    Returns:
      The adapter of the concepts that have not diverged.

    Raises:
      UserError: for mistakes in config, devices, directory or model, before weights are read; if
        another training is at work in the directory; and if every concept has diverged, naming
        steps and concepts. What was saved stays.
      Interrupted: if SIGTERM, Ctrl-C or a preemption ended the training early. The state is saved;
        calling again continues bit for bit.
    """
    run_training(config, workdir, profile=profile)
    workdir = open_path(workdir)
    return load_adapter(workdir if has_waves(workdir) else workdir / "adapter")


def run_training(config: ConfigDict, workdir: epath.PathLike, *, profile: bool = False) -> None:
    """As `train`, without reading the adapter."""
    validate(config)
    with locked(workdir) as folder:
        _train_all(config, folder, profile)


def _train_all(config: ConfigDict, workdir: epath.Path, profile: bool) -> None:
    concepts = concepts_from(config)
    runs = plan_runs(workdir, config, jax.device_count())
    placement = Placement(config.parallel.strategy, runs[0].size, config.train.batch_size)
    for run in runs:
        check_same_config(run.config, run.folder)
    in_waves = len(runs) > 1
    waves = runs if in_waves else []
    to_do = [run for run in runs if not (in_waves and is_done(run))]
    writes = jax.process_index() == 0
    if to_do:
        session = open_session(config, concepts, runs, placement)
        if writes and runs[0].size != len(concepts):
            write_waves(workdir, runs[0].size, len(concepts))
    else:
        say(f"all {len(runs)} waves are done: nothing left to train")
    if writes:
        gather_outcomes(workdir, waves)
    with Preemption() as preemption:
        for run in to_do:
            steps, diverged_at = train_run(session, run, preemption, profile and run is to_do[0])
            if writes:
                write_outcomes(run.folder, outcomes_of(run.concepts, steps, diverged_at))
                gather_outcomes(workdir, [run] if in_waves else [])
            if preemption.stopped and run is not to_do[-1]:
                raise Interrupted(f"stopped after {run.label}, saved", steps)
    if jax.process_count() > 1:  # process 0 has written the outcomes
        multihost_utils.sync_global_devices("outcomes")
    _report(read_outcomes(workdir), workdir)


def wave_size(num_concepts: int, num_devices: int, per_device: int | None) -> int:
    """Number of concepts in each wave: as few waves as `per_device` allows, of about equal size.

    Fewer concepts than devices share the devices; otherwise each device has the same number.
    `per_device` None is no limit.
    """
    if num_concepts < num_devices:
        return num_concepts
    waves = math.ceil(num_concepts / (num_devices * per_device)) if per_device else 1
    return math.ceil(num_concepts / waves / num_devices) * num_devices


def plan_runs(workdir: epath.PathLike, config: ConfigDict, num_devices: int) -> list[Run]:
    """The runs of a training, in order: a single run, or one run for each wave.

    A directory keeps its wave size, on other devices too.

    Raises:
      UserError: if the directory was begun with another number of concepts.
    """
    workdir, concepts = open_path(workdir), concepts_from(config)
    size = wave_size(len(concepts), num_devices, config.train.concepts_per_device)
    if begun := read_waves(workdir):
        if begun["concepts"] != len(concepts):
            raise UserError(
                f"`workdir` {workdir} belongs to a training of {begun['concepts']} concepts, the"
                f" config has {len(concepts)}; use another `workdir`, or the original concepts"
            )
        size = begun["size"]
    elif (workdir / RUN_FILE).exists():
        size = len(concepts)
    if size >= len(concepts):
        return [Run(workdir, config, concepts, size)]
    parts = [concepts[start : start + size] for start in range(0, len(concepts), size)]
    bare = with_concepts(config, ())  # so that not every wave copies thousands of concepts
    return [
        Run(
            folder=workdir / "waves" / f"{number:04d}",
            config=with_concepts(bare, part),
            concepts=part,
            size=size,
            label=f"wave {number + 1} of {len(parts)}",
        )
        for number, part in enumerate(parts)
    ]


def is_done(run: Run) -> bool:
    """Whether each concept of a run was trained as long as the config says, or diverged.

    A run whose adapter should read prompts in another way is not done.
    """
    outcomes = read_outcomes(run.folder)
    return (
        bool(outcomes)
        and describes(run.config, run.folder)
        and all(
            o["steps"] == run.config.train.steps or o["diverged_at"] is not None for o in outcomes
        )
    )


def gather_outcomes(workdir: epath.PathLike, waves: Iterable[Run]) -> None:
    """Brings the outcomes in the working directory up to date with those of these waves.

    Outcomes of other waves stay.
    """
    workdir, waves = open_path(workdir), list(waves)
    renewed = {concept.name for wave in waves for concept in wave.concepts}
    gathered = {o["name"]: o for o in read_outcomes(workdir) if o["name"] not in renewed}
    for wave in waves:
        path = wave.folder.relative_to(workdir)
        for outcome in read_outcomes(wave.folder):
            adapter = outcome["adapter"] and str(path / outcome["adapter"])
            gathered[outcome["name"]] = outcome | {"adapter": adapter}
    if waves:
        write_outcomes(workdir, gathered.values())


def _report(outcomes: Sequence[Mapping[str, Any]], workdir: epath.Path) -> None:
    """Says which concepts diverged; raises `UserError` if all have."""
    diverged = [o for o in outcomes if o["diverged_at"] is not None]
    named = ", ".join(f"{o['name']!r} at step {o['diverged_at']}" for o in diverged)
    advice = (
        "In a new `workdir`, lower the learning rates or the guidance of such concepts, or set"
        " optimizer.clip_norm"
    )
    if diverged and len(diverged) == len(outcomes):
        raise UserError(
            f"loss, module or optimiser state no longer finite: {named}; the checkpoints in"
            f" {workdir} hold the last finite state. {advice}"
        )
    if len(outcomes) > 1:
        say(f"{len(outcomes) - len(diverged)} of {len(outcomes)} concepts trained")
    if diverged:
        say(f"dropped, loss, module or optimiser state no longer finite: {named}. {advice}")
