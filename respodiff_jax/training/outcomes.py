"""`outcomes.jsonl`: how the training of each concept ended.

One line for each concept: `{"name", "group", "steps", "diverged_at", "adapter"}`. `adapter` is the
folder that holds the concept, relative to the file, or null if the concept diverged. Each run's
folder has a file for its own concepts. The working directory of several waves has one for all
finished waves, and is marked by `waves.json`: `{"size", "concepts"}`.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, TypedDict

from etils import epath
from msgspec import Meta

from respodiff_jax.method.concepts import Concept
from respodiff_jax.storage import checked, open_path, read_json, read_json_lines, write_whole
from respodiff_jax.training.record import RUN_FILE

OUTCOMES_FILE = "outcomes.jsonl"
_WAVES_FILE = "waves.json"


class Outcome(TypedDict):
    """A line of `outcomes.jsonl`."""

    name: str
    group: str
    steps: Annotated[int, Meta(ge=0)]
    diverged_at: int | None
    adapter: str | None


class Waves(TypedDict):
    """Numbers of concepts: in a wave, and in all."""

    size: Annotated[int, Meta(ge=1)]
    concepts: Annotated[int, Meta(ge=1)]


def read_outcomes(folder: epath.PathLike) -> list[Outcome]:
    """The outcomes in a folder; [] where there is no file."""
    path = open_path(folder) / OUTCOMES_FILE
    lines = read_json_lines(path, "outcomes") if path.exists() else []
    return [checked(Outcome, line, f"{path}, line {n}") for n, line in enumerate(lines, 1)]


def write_outcomes(folder: epath.PathLike, outcomes: Iterable[Outcome]) -> None:
    """Replaces the outcomes in a folder."""
    _write_lines(open_path(folder) / OUTCOMES_FILE, outcomes)


def outcomes_of(
    concepts: Sequence[Concept], steps: int, diverged_at: Iterable[int]
) -> list[Outcome]:
    """The outcomes of a run's concepts; `diverged_at` has the step of each, or -1."""
    return [
        {
            "name": concept.name,
            "group": concept.group,
            "steps": steps,
            "diverged_at": None if step < 0 else int(step),
            "adapter": "adapter" if step < 0 else None,
        }
        for concept, step in zip(concepts, diverged_at, strict=True)
    ]


def has_waves(workdir: epath.PathLike) -> bool:
    """Whether a directory is that of several waves."""
    workdir = open_path(workdir)
    return (workdir / _WAVES_FILE).exists() and not (workdir / RUN_FILE).exists()


def read_waves(workdir: epath.PathLike) -> Waves | None:
    """How the concepts are divided into waves, None where it is not recorded."""
    path = open_path(workdir) / _WAVES_FILE
    return checked(Waves, read_json(path, "record of waves"), str(path)) if path.exists() else None


def write_waves(workdir: epath.PathLike, size: int, concepts: int) -> None:
    """Records how the concepts are divided into waves, for when the training continues."""
    _write_lines(open_path(workdir) / _WAVES_FILE, [{"size": size, "concepts": concepts}])


def _write_lines(path: epath.Path, rows: Iterable[Outcome | Waves]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
