"""Concepts files: many concepts as JSON lines, as CSV, or as a prepared `concept_prompts` data set.

A row has the fields of `respodiff_jax.method.concepts.Concept`: `name`, `group`, `neutral_prompts`,
either `target_prompt` or `unsafe_prompt`, and any hyper-parameters. It may also have `kind`,
"fairness" or "safety", which must match the prompt. Several neutral prompts are a list in JSON; in
a CSV cell, "|" separates them. So do several target prompts, one for each neutral prompt.

    {"name": "a man", "group": "gender", "neutral_prompts": ["a person"], "target_prompt": "a man"}
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from respodiff_jax.data.prompt_files import Column, Layout, read_table
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import HYPER_PARAMETERS, Concept, validate_concepts
from respodiff_jax.storage import read_objects

_TEXTS = ("name", "group", "kind", "target_prompt", "unsafe_prompt")
SUFFIXES = (".jsonl", ".csv")


def _prompts(cell: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in cell.split("|"))


def _one_or_several(cell: str) -> str | tuple[str, ...]:
    prompts = _prompts(cell)
    return prompts[0] if len(prompts) == 1 else prompts


CONCEPTS: Layout = MappingProxyType(
    {
        "name": Column(),
        "group": Column(),
        "kind": Column(required=False),
        "neutral_prompts": Column(_prompts, "prompts separated by |"),
        "target_prompt": Column(_one_or_several, "prompts separated by |", required=False),
        "unsafe_prompt": Column(required=False),
    }
    | {name: Column(float, "a number", required=False) for name in HYPER_PARAMETERS}
)


def read_concepts(
    source: epath.PathLike, defaults: Mapping[str, float] | None = None
) -> tuple[Concept, ...]:
    """Reads the concepts of a file or of a prepared data set, in its order.

    Args:
      source: a file ending in .jsonl or .csv, or a folder that the builder `concept_prompts`
        prepared.
      defaults: hyper-parameters for rows that leave them out; None takes those of `Concept`.

    Raises:
      UserError: naming the file, the line or the concept, and what is wrong.
    """
    concepts = []
    for where, row in read_rows(source):
        try:
            concepts.append(_concept(row, defaults or {}))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    try:
        validate_concepts(concepts)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return tuple(concepts)


def read_rows(source: epath.PathLike) -> list[tuple[str, dict[str, Any]]]:
    """Reads the rows of a source of `read_concepts`, before they are checked.

    Each is its origin, for messages, and its fields; one that is left out is missing or None.
    """
    path = epath.Path(source)
    if path.is_dir():
        rows = [(str(source), row) for row in _read_data_set(path)]
    elif not path.is_file():
        raise UserError(f"there is no concepts file {source}")
    elif path.suffix == ".csv":
        rows = [(str(source), row) for row in read_table(path, CONCEPTS, only=True)]
    elif path.suffix == ".jsonl":
        rows = read_objects(path, "concepts file")
    else:
        raise UserError(f"{source}: concepts files end in {' or '.join(SUFFIXES)}")
    if not rows:
        raise UserError(f"{source} has no concepts")
    return rows


def _read_data_set(path: epath.Path) -> list[dict[str, Any]]:
    try:
        builder = tfds.builder_from_directory(path)
        examples = builder.as_data_source("train") if builder.name == "concept_prompts" else None
        problem = f"it is {builder.name}"
    except (OSError, ValueError, AssertionError) as error:
        examples, problem = None, str(error)
    if examples is None:
        raise UserError(
            f"{path} is a folder, but not a prepared data set concept_prompts: {problem}"
        )
    return [_from_example(example) for example in examples]


def to_example(row: Mapping[str, Any]) -> dict[str, Any]:
    """A checked row as the data set stores it; "" and NaN stand for fields that are left out."""
    example: dict[str, Any] = {name: row.get(name) or "" for name in _TEXTS}
    prompts = row["neutral_prompts"]
    example["neutral_prompts"] = [prompts] if isinstance(prompts, str) else list(prompts)
    optional = ("words", "default_scale", "max_timestep")
    lost = [name for name in optional if row.get(name) is not None]
    if isinstance(row.get("guidance_scale"), list | tuple):
        lost.append("a guidance_scale for each neutral prompt")
    if not isinstance(example["target_prompt"], str):
        if len(example["target_prompt"]) == 1:
            lost.append("a list of one target_prompt")
        example["target_prompt"] = "|".join(example["target_prompt"])
    if lost:
        raise UserError(
            f"concept {row['name']!r}: a data set does not hold {', '.join(lost)}; train from the"
            " concepts file"
        )
    for name in HYPER_PARAMETERS:
        example[name] = math.nan if row.get(name) is None else row[name]
    return example


def _from_example(example: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {name: example[name].decode() or None for name in _TEXTS}
    row["neutral_prompts"] = tuple(prompt.decode() for prompt in example["neutral_prompts"])
    if row["target_prompt"]:
        row["target_prompt"] = _one_or_several(row["target_prompt"])
    for name in HYPER_PARAMETERS:
        # The shortest decimals: 0.03 and not 0.029999999329447746.
        row[name] = None if math.isnan(example[name]) else float(str(np.float32(example[name])))
    return row


def _concept(row: Mapping[str, Any], defaults: Mapping[str, float]) -> Concept:
    fields = {name: value for name, value in row.items() if value is not None}
    kind = fields.pop("kind", None)
    concept = Concept.from_dict({**defaults, **fields})
    actual, prompt = (
        ("safety", "unsafe_prompt") if concept.is_safety else ("fairness", "target_prompt")
    )
    if kind not in (None, actual):
        raise UserError(
            f"concept {concept.name!r}: kind is {kind!r} with {prompt}, expected {actual!r}"
        )
    return concept
