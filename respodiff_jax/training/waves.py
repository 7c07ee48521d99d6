"""Waves: a large batch of concepts, trained so many at a time.

Each wave is a run of its own in a folder of its own, `waves/0000`, `waves/0001`, ... of the working
directory: with its `run.json`, checkpoints, logs and, at its end, its adapter. All have the same
number of concepts, so that one compiled step serves all, and as many on each device; the last is
filled up with copies of its last concept, which are trained and thrown away. A batch that fits the
devices is a single wave, in the working directory itself.

`outcomes.jsonl` tells what became of each concept: a line `{"name", "group", "steps",
"diverged_at", "adapter"}`, where `adapter` is the folder that has it, relative to the file's, or
null if the concept diverged. Each wave's folder has one of its concepts, the working directory one
of all waves that have ended; both are written when a wave ends.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from respodiff_jax.adapters import Adapter, concatenate, load_adapter, select
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept
from respodiff_jax.storage import open_path, parse_json, read_json_lines, write_whole
from respodiff_jax.training.checkpoint import RUN_FILE
from respodiff_jax.training.config import concepts_from, with_concepts

OUTCOMES_FILE = "outcomes.jsonl"
_PLAN_FILE = "waves.json"


@dataclasses.dataclass(frozen=True)
class Wave:
    """Concepts that are trained together.

    Attributes:
      folder: working directory of the wave.
      config: the job's, with these concepts.
      concepts: of the wave.
      size: concepts in the training state; those past `len(concepts)` are copies of the last.
      label: "" for a single wave, else what to call it.
    """

    folder: epath.Path
    config: ConfigDict
    concepts: tuple[Concept, ...]
    size: int
    label: str = ""

    @property
    def filled_up(self) -> tuple[Concept, ...]:
        """The concepts of the training state."""
        return fill_up(self.concepts, self.size)

    @property
    def is_done(self) -> bool:
        """Whether all its concepts have been trained as long as the config says, or diverged."""
        steps = self.config.train.steps
        outcomes = read_outcomes(self.folder)
        return bool(outcomes) and all(
            o["steps"] == steps or o["diverged_at"] is not None for o in outcomes
        )

    def write_outcomes(self, steps: int, diverged_at: Iterable[int]) -> None:
        """Records how the wave ended.

        Args:
          steps: trained.
          diverged_at: for each concept the step at which it diverged, or -1.
        """
        _write_lines(
            self.folder / OUTCOMES_FILE,
            [
                {
                    "name": concept.name,
                    "group": concept.group,
                    "steps": steps,
                    "diverged_at": None if step < 0 else int(step),
                    "adapter": "adapter" if step < 0 else None,
                }
                for concept, step in zip(self.concepts, diverged_at, strict=True)
            ],
        )


def wave_size(num_concepts: int, num_devices: int, per_device: int | None) -> int:
    """Concepts of each wave: as few waves as `per_device` allows, of about equal size.

    Fewer concepts than devices share the devices; of others each device has as many.

    Args:
      num_concepts: of the job.
      num_devices: over all processes.
      per_device: the most that a device trains at a time; None for no limit.
    """
    if num_concepts < num_devices:
        return num_concepts
    waves = math.ceil(num_concepts / (num_devices * per_device)) if per_device else 1
    return math.ceil(num_concepts / waves / num_devices) * num_devices


def fill_up(concepts: tuple[Concept, ...], size: int) -> tuple[Concept, ...]:
    """So many concepts; those past the given are copies of the last."""
    return concepts + concepts[-1:] * (size - len(concepts))


def plan_waves(workdir: epath.PathLike, config: ConfigDict, num_devices: int) -> list[Wave]:
    """The waves of a job, in order.

    A directory that has been begun keeps its waves on other devices, which have to be able to share
    its batch.

    Raises:
      UserError: if the directory was begun with another number of concepts.
    """
    workdir, concepts = open_path(workdir), concepts_from(config)
    size = wave_size(len(concepts), num_devices, config.train.concepts_per_device)
    if (workdir / _PLAN_FILE).exists():
        plan = parse_json((workdir / _PLAN_FILE).read_text(), str(workdir / _PLAN_FILE))
        if plan["concepts"] != len(concepts):
            raise UserError(
                f"workdir {workdir} belongs to a batch of {plan['concepts']} concepts, here are"
                f" {len(concepts)}; use another --workdir for more, or the batch it began with"
            )
        size = plan["size"]
    elif (workdir / RUN_FILE).exists():
        size = len(concepts)
    if size >= len(concepts):  # more with copies
        return [Wave(workdir, config, concepts, size)]
    parts = [concepts[start : start + size] for start in range(0, len(concepts), size)]
    bare = with_concepts(config, ())  # thousands of concepts need not be copied for each wave
    return [
        Wave(
            folder=workdir / "waves" / f"{number:04d}",
            config=with_concepts(bare, part),
            concepts=part,
            size=size,
            label=f"wave {number + 1} of {len(parts)}",
        )
        for number, part in enumerate(parts)
    ]


def write_plan(workdir: epath.PathLike, waves: Sequence[Wave]) -> None:
    """Makes the waves binding for the directory; for one without copies its `run.json` does."""
    plan = {"size": waves[0].size, "concepts": sum(len(wave.concepts) for wave in waves)}
    if plan["size"] != plan["concepts"]:
        _write_lines(open_path(workdir) / _PLAN_FILE, [plan])


def gather_outcomes(workdir: epath.PathLike, waves: Iterable[Wave]) -> list[dict[str, Any]]:
    """Brings the directory's outcomes up to date with those of the waves that have ended.

    Args:
      workdir: of the job.
      waves: those to look at; what is known of others stays.

    Returns:
      All outcomes. A single wave's are the directory's own.
    """
    workdir = open_path(workdir)
    labelled = [wave for wave in waves if wave.label]
    renewed = {concept.name for wave in labelled for concept in wave.concepts}
    gathered = {o["name"]: o for o in read_outcomes(workdir) if o["name"] not in renewed}
    for wave in labelled:
        path = wave.folder.relative_to(workdir)
        for outcome in read_outcomes(wave.folder):
            adapter = outcome["adapter"] and str(path / outcome["adapter"])
            gathered[outcome["name"]] = outcome | {"adapter": adapter}
    if labelled:
        _write_lines(workdir / OUTCOMES_FILE, [*gathered.values()])
    return [*gathered.values()]


def is_batch(workdir: epath.PathLike) -> bool:
    """Whether a directory is that of several waves."""
    workdir = open_path(workdir)
    return (workdir / _PLAN_FILE).exists() and not (workdir / RUN_FILE).exists()


def load_batch(workdir: epath.PathLike, only: Sequence[str] = ()) -> Adapter:
    """The adapter of the concepts that the waves have trained so far.

    Args:
      workdir: of several waves.
      only: names of the concepts to take; by default all.

    Raises:
      UserError: if no wave has ended, or a concept is not there, saying what became of it.
    """
    outcomes = {outcome["name"]: outcome for outcome in read_outcomes(workdir)}
    if not outcomes:
        raise UserError(
            f"no wave of {workdir} has ended yet: there is no adapter to use; run the training on"
        )
    for name in only:
        if name not in outcomes:
            raise UserError(
                f"{workdir} has no concept {name!r} yet, see its {OUTCOMES_FILE}; train on, or"
                " choose one of these"
            )
        if outcomes[name]["adapter"] is None:
            step = outcomes[name]["diverged_at"]
            raise UserError(
                f"{workdir}: concept {name!r} diverged at step {step}; choose others, or train it"
                " again with lower learning rates"
            )
    wanted = [outcomes[name] for name in only] or [*outcomes.values()]
    folders = dict.fromkeys(o["adapter"] for o in wanted if o["adapter"] is not None)
    if not folders:
        raise UserError(
            f"{workdir}: all concepts of the waves that have ended diverged, see its"
            f" {OUTCOMES_FILE}; train again with lower learning rates"
        )
    found = concatenate([load_adapter(open_path(workdir) / folder) for folder in folders])
    return select(found, only) if only else found


def read_outcomes(folder: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a folder's `outcomes.jsonl`; none where there is none."""
    path = open_path(folder) / OUTCOMES_FILE
    return read_json_lines(path) if path.exists() else []


def _write_lines(path: epath.Path, rows: Sequence[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
