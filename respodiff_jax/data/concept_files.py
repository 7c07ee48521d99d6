"""Concepts files: many concepts as JSON lines, as CSV, or as a prepared `concept_prompts` data set.

A row has the fields of `respodiff_jax.method.concepts.Concept`, of which `name`, `group`,
`neutral_prompts` and either `target_prompt` or `unsafe_prompt` must be there, and may have `kind`,
"fairness" or "safety", which is then checked. In JSON `neutral_prompts` is a text or a list of
them; in a cell of CSV they are parted by "|".

    {"name": "a man", "group": "gender", "neutral_prompts": ["a person"], "target_prompt": "a man"}
"""

import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from respodiff_jax.data.prompt_files import Column, Layout, read_table
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import HYPER_PARAMETERS, Concept, validate_concepts

_KINDS = MappingProxyType({"fairness": "target_prompt", "safety": "unsafe_prompt"})
_TEXTS = ("name", "group", "kind", "target_prompt", "unsafe_prompt")
SUFFIXES = (".jsonl", ".csv")


def _prompts(cell: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in cell.split("|"))


CONCEPTS: Layout = MappingProxyType(
    {
        "name": Column(),
        "group": Column(),
        "kind": Column(required=False),
        "neutral_prompts": Column(_prompts, "prompts parted by |"),
        "target_prompt": Column(required=False),
        "unsafe_prompt": Column(required=False),
    }
    | {name: Column(float, "a number", required=False) for name in HYPER_PARAMETERS}
)


def read_concepts(
    source: epath.PathLike, defaults: Mapping[str, float] | None = None
) -> tuple[Concept, ...]:
    """The concepts of a file or of a prepared data set, in its order.

    Args:
      source: a file ending in .jsonl or .csv, or a folder that the builder `concept_prompts` has
        prepared.
      defaults: for the numbers that rows leave out, by default those of `Concept`.

    Raises:
      UserError: naming the file, the line or the concept, and what is wrong with it.
    """
    rows = read_rows(source)
    try:
        concepts = tuple(_concept(row, defaults or {}) for row in rows)
        validate_concepts(concepts)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    return concepts


def read_rows(source: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a source as `read_concepts` takes it; what a row leaves out is None."""
    path = epath.Path(source)
    if path.is_dir():
        return _read_data_set(path)
    if not path.is_file():
        raise UserError(f"there is no concepts file {source}")
    if path.suffix == ".csv":
        return read_table(path, CONCEPTS, only=True)
    if path.suffix == ".jsonl":
        return _read_json_lines(path)
    raise UserError(f"{source}: concepts files end in {' or '.join(SUFFIXES)}")


def _read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: {row!r}, expected an object in braces")
        rows.append(_checked(row, f"{path}, line {number}"))
    if not rows:
        raise UserError(f"{path} has no concepts")
    return rows


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with all fields, its neutral prompts a tuple."""
    if unknown := sorted(row.keys() - CONCEPTS.keys()):
        raise UserError(f"{where}: unknown fields {unknown}, expected {', '.join(CONCEPTS)}")
    row = {name: row.get(name) for name in CONCEPTS}
    if missing := [name for name, c in CONCEPTS.items() if c.required and row[name] is None]:
        raise UserError(f"{where}: missing fields {missing}")
    if isinstance(row["neutral_prompts"], str):
        row["neutral_prompts"] = (row["neutral_prompts"],)
    if not isinstance(row["neutral_prompts"], Sequence):
        raise UserError(
            f"{where}: neutral_prompts is {row['neutral_prompts']!r}, expected a text or a list"
        )
    for name in HYPER_PARAMETERS:
        value = row[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{where}: {name} is {value!r}, expected a number")
    for name in _TEXTS:
        if row[name] is not None and not isinstance(row[name], str):
            raise UserError(f"{where}: {name} is {row[name]!r}, expected a text")
    return row | {"neutral_prompts": tuple(row["neutral_prompts"])}


def _read_data_set(path: epath.Path) -> list[dict[str, Any]]:
    try:
        builder = tfds.builder_from_directory(path)
        if builder.name != "concept_prompts":
            raise UserError(f"it is {builder.name}")
        examples = builder.as_data_source("train")
    except (OSError, ValueError, AssertionError) as error:
        raise UserError(
            f"{path} is a folder, but not a prepared data set concept_prompts: {error}"
        ) from error
    return [_from_example(example) for example in examples]


def to_example(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the data set holds it: blank texts and NaN for what it leaves out."""
    example = {name: "" if row[name] is None else row[name] for name in CONCEPTS}
    return example | {
        name: math.nan if row[name] is None else row[name] for name in HYPER_PARAMETERS
    }


def _from_example(example: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {name: example[name].decode() or None for name in _TEXTS}
    row["neutral_prompts"] = tuple(prompt.decode() for prompt in example["neutral_prompts"])
    for name in HYPER_PARAMETERS:
        # The shortest decimals: 0.03 and not 0.029999999329447746.
        row[name] = None if math.isnan(example[name]) else float(str(np.float32(example[name])))
    return row


def _concept(row: Mapping[str, Any], defaults: Mapping[str, float]) -> Concept:
    fields = {name: value for name, value in row.items() if value is not None and name != "kind"}
    kind = row["kind"]
    if kind is not None and (kind not in _KINDS or _KINDS[kind] not in fields):
        expected = " or ".join(f"{k!r} with {prompt}" for k, prompt in _KINDS.items())
        given = [prompt for prompt in _KINDS.values() if prompt in fields] or ["neither prompt"]
        raise UserError(
            f"concept {row['name']!r}: kind is {kind!r} with {', '.join(given)}, expected"
            f" {expected}"
        )
    return Concept.from_dict({**defaults, **fields})
