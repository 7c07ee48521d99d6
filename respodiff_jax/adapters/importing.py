"""Checkpoints of the authors' code and of SDisc as adapters: `respodiff import`."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from respodiff_jax.adapters.adapter import Adapter
from respodiff_jax.backbone import Backbone
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.modules import MidBlockModule
from respodiff_jax.method.paper import GENDER, RACE, SAFETY


def read_concept_ids(
    file: str | os.PathLike, only: Sequence[str] = ()
) -> dict[str, tuple[int, Concept]]:
    """Which column of a checkpoint holds which concept.

    Args:
      file: JSON, `{"a woman": 0, ...}` for the paper's concepts; for others `{"a wizard": {"id": 7,
        "group": ..., "neutral_prompts": [...], "target_prompt": ...}}` with fields of `Concept`.
      only: names to take; all by default.

    Raises:
      UserError: when the file is not such JSON, names a concept twice or one that is not known by
        itself, or gives two concepts one id.
    """
    try:
        text = pathlib.Path(file).read_text(encoding="utf-8")
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"concept ids {file} cannot be read: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise UserError(f'concept ids {file}: expected JSON like {{"a woman": 0, "a man": 1}}')
    if unknown := [name for name in only if name not in entries]:
        raise UserError(f"concept ids {file} has no {unknown}, only {list(entries)}")
    chosen, seen = {}, {}
    for name in only or entries:
        number, concept = _entry(file, name, entries[name])
        if number in seen:
            raise UserError(
                f"concept ids {file}: {seen[number]!r} and {name!r} both have id {number}, but a"
                " checkpoint has one column for an id, trained for one of them; choose which with"
                f" --only, or leave the other out of {file}"
            )
        seen[number] = name
        chosen[name] = (number, concept)
    return chosen


def adapter_from_checkpoint(
    ram: np.ndarray,
    sam: np.ndarray,
    concept_ids: Mapping[str, tuple[int, Concept]],
    backbone: Backbone,
    resolution: int,
) -> Adapter:
    """An adapter of kind `constant` of the columns that the concepts name.

    Args:
      ram: `(number of ids, C, H, W)`.
      sam: likewise.
      concept_ids: as from `read_concept_ids`.
      backbone: the model that the checkpoint was trained on; may be abstract.
      resolution: that it was trained at, in pixels.

    Raises:
      UserError: for an id that the checkpoint does not have, or values that are not finite.
    """
    for name, (number, _) in concept_ids.items():
        if number >= len(ram):
            raise UserError(
                f"concept {name!r} has id {number}, but the checkpoint holds ids 0 .."
                f" {len(ram) - 1}; is the file of concept ids of another checkpoint?"
            )
    columns = [number for number, _ in concept_ids.values()]
    return Adapter(
        concepts=tuple(concept for _, concept in concept_ids.values()),
        module=MidBlockModule("constant", backbone.mid_block_shape(resolution)),
        ram={"constant": ram[columns].transpose(0, 2, 3, 1)},
        sam={"constant": sam[columns].transpose(0, 2, 3, 1)},
        backbone=backbone.trained_at(resolution),
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted(key for key in found if keys.count(key) > 1)
        raise UserError(f"{twice} come more than once in it; JSON would keep only the last")
    return found


def _entry(file: str | os.PathLike, name: str, value: Any) -> tuple[int, Concept]:
    """The id and the concept of one entry."""
    fields = dict(value) if isinstance(value, dict) else {"id": value}
    number = fields.pop("id", None)
    if type(number) is not int or number < 0:
        raise UserError(f"concept ids {file}: {name!r} has id {number!r}, expected 0 or more")
    if fields:
        return number, Concept.from_dict({"name": name} | fields)
    known = {c.name: c for group in (GENDER, RACE, SAFETY) for c in group.values()}
    for candidate in (name, f"a {name} person", f"an {name} person", f"anti-{name}"):
        if candidate in known:
            return number, known[candidate]
    raise UserError(
        f"concept ids {file}: {name!r} is not one of the paper's concepts ({', '.join(known)});"
        f' describe it, as {{"{name}": {{"id": {number}, "group": ..., "neutral_prompts": [...],'
        ' "target_prompt": ...}}'
    )
