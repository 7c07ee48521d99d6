"""Combines adapters, selects their concepts, and checks that they fit a model."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from respodiff_jax.adapters.adapter import Adapter, hidden_channels, label
from respodiff_jax.adapters.files import ROLES
from respodiff_jax.backbone import Backbone
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept, validate_concepts
from respodiff_jax.method.modules import Steering
from respodiff_jax.method.reading import Reading, always


@dataclasses.dataclass(frozen=True, eq=False)
class CombinedAdapter:
    """Adapters of different architectures that steer together. They cannot be saved in one file.

    Attributes:
      parts: the adapters. Concepts are numbered across all parts.
    """

    parts: tuple[Adapter, ...]

    @property
    def concepts(self) -> tuple[Concept, ...]:
        return tuple(concept for part in self.parts for concept in part.concepts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(concept.name for concept in self.concepts)

    @property
    def default_scales(self) -> tuple[float, ...]:
        return tuple(scale for part in self.parts for scale in part.default_scales)

    @property
    def backbone(self) -> Mapping[str, Any]:
        """The first adapter's model."""
        return self.parts[0].backbone

    @property
    def training(self) -> Mapping[str, Any] | None:
        """The training summary that all parts agree on, or None."""
        return _common_training(self.parts)


def as_adapters(
    given: Adapter | CombinedAdapter | Sequence[Adapter] | None,
) -> list[Adapter | CombinedAdapter]:
    """None, one adapter or several, as a list.

    Raises:
      UserError: for anything else.
    """
    adapters = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    for adapter in adapters:
        if not isinstance(adapter, Adapter | CombinedAdapter):
            raise UserError(f"`adapter` is {adapter!r}, expected an adapter as from `load_adapter`")
    return adapters


def combine(adapters: Sequence[Adapter]) -> Adapter | CombinedAdapter:
    """Combines adapters into one that has the concepts of all.

    Adapters of one architecture become one adapter, without metrics.

    Raises:
      UserError: if mid-block shapes differ, or two concepts have the same name.
    """
    first = adapters[0]
    for other in adapters[1:]:
        shapes = first.module.mid_block_shape, other.module.mid_block_shape
        if shapes[0] != shapes[1]:
            raise UserError(
                f"adapters cannot be used together: their mid-block shapes are {shapes[0]}"
                f" ({label(first)}) and {shapes[1]} ({label(other)}); use adapters of one model and"
                " resolution"
            )
    validate_concepts([concept for adapter in adapters for concept in adapter.concepts])
    alike: dict[Any, list[Adapter]] = {}
    for adapter in adapters:
        kind = adapter.module.kind, hidden_channels(adapter.module)
        alike.setdefault(kind, []).append(adapter)
    parts = tuple(map(_concatenate, alike.values()))
    return parts[0] if len(parts) == 1 else CombinedAdapter(parts)


def _concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter with the concepts of several of one architecture."""
    first = adapters[0]
    if len(adapters) == 1:
        return first
    ram, sam = (
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *(getattr(a, role) for a in adapters))
        for role in ROLES
    )
    return Adapter(
        concepts=tuple(concept for adapter in adapters for concept in adapter.concepts),
        module=first.module,
        ram=ram,
        sam=sam,
        backbone=first.backbone,
        training=_common_training(adapters),
        reading=_concatenate_readings(adapters),
        reading_accuracy=dict(
            item for a in reversed(adapters) for item in a.reading_accuracy.items()
        ),
    )


def _concatenate_readings(adapters: Sequence[Adapter]) -> Reading | None:
    """The heads of all concepts. Concepts of an adapter without a reading steer every prompt."""
    widths = {a.reading.weight.shape[-1] for a in adapters if a.reading is not None}
    if not widths:
        return None
    if len(widths) > 1:
        raise UserError(
            f"adapters cannot be used together: they read text states of {sorted(widths)}"
            " features; use adapters trained on the same model"
        )
    readings = [a.reading or always(len(a.concepts), *widths) for a in adapters]
    return Reading(*map(np.concatenate, zip(*readings, strict=True)))


def _common_training(adapters: Sequence[Adapter]) -> Mapping[str, Any] | None:
    first = adapters[0].training
    return first if all(adapter.training == first for adapter in adapters) else None


def steerings(adapter: Adapter | CombinedAdapter, weights: Any) -> tuple[Steering, ...]:
    """What an adapter adds at the mid-block of a batch, one `Steering` for each part.

    Args:
      adapter: has N concepts.
      weights: `(B, N)`, weight of each concept in each sample.

    Raises:
      UserError: if `weights` is not `(B, N)`.
    """
    if np.ndim(weights) != 2 or np.shape(weights)[1] != len(adapter.concepts):
        raise UserError(
            f"weights have shape {np.shape(weights)}, expected (batch, {len(adapter.concepts)})"
            f" for the concepts {', '.join(adapter.names)}"
        )
    weights = np.asarray(weights, np.float32)
    ends = np.cumsum([len(part.concepts) for part in adapter.parts])
    limits = [
        jax.tree.map(lambda x: np.tile(x, (len(weights), 1)), p.max_timesteps)
        for p in adapter.parts
    ]
    scales = np.split(weights, ends[:-1], axis=1)
    return tuple(
        Steering(part.ram, part.sam, own, own, limit)
        for part, own, limit in zip(adapter.parts, scales, limits, strict=True)
    )


def check_once(only: Sequence[str]) -> None:
    """Raises `UserError` if `only` names a concept twice."""
    if twice := sorted({name for name in only if list(only).count(name) > 1}):
        raise UserError(f"`only` names {twice} more than once")


def select(adapter: Adapter | CombinedAdapter, names: Sequence[str]) -> Adapter | CombinedAdapter:
    """The adapter with only the named concepts, in this order within each part.

    Metrics describe the whole adapter: they are dropped unless all concepts are kept.

    Raises:
      UserError: if the adapter lacks a name.
    """
    if unknown := sorted(set(names) - set(adapter.names)):
        raise UserError(f"the adapter has no concepts {unknown}; it has {label(adapter)}")
    if isinstance(adapter, CombinedAdapter):
        chosen = ([n for n in names if n in part.names] for part in adapter.parts)
        parts = [select(p, own) for p, own in zip(adapter.parts, chosen, strict=True) if own]
        return parts[0] if len(parts) == 1 else CombinedAdapter(tuple(parts))
    rows = [adapter.names.index(name) for name in names]
    ram, sam = jax.tree.map(lambda x: x[rows], (adapter.ram, adapter.sam))
    return dataclasses.replace(
        adapter,
        concepts=tuple(adapter.concepts[row] for row in rows),
        ram=ram,
        sam=sam,
        metrics=adapter.metrics if set(names) == set(adapter.names) else None,
        reading=adapter.reading and Reading(*(leaf[rows] for leaf in adapter.reading)),
    )


def unconditional(adapter: Adapter | CombinedAdapter) -> Adapter | CombinedAdapter:
    """The adapter that steers every prompt at every timestep, as the paper's do."""
    parts = tuple(
        dataclasses.replace(
            part,
            reading=None,
            concepts=tuple(dataclasses.replace(c, max_timestep=None) for c in part.concepts),
        )
        for part in adapter.parts
    )
    return parts[0] if len(parts) == 1 else CombinedAdapter(parts)


def adapter_sha256(adapter: Adapter | CombinedAdapter) -> str:
    """A digest of an adapter's concepts and parameters."""
    digest = hashlib.sha256(json.dumps([c.to_dict() for c in adapter.concepts]).encode())
    leaves = [(part.ram, part.sam, part.reading) for part in adapter.parts]
    for leaf in jax.tree.leaves(leaves):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def check_fits(adapter: Adapter | CombinedAdapter, backbone: Backbone, resolution: int) -> None:
    """Checks that an adapter can steer a model at a resolution.

    A `constant` needs exactly the mid-block shape of the training. `mlp` and `conv` need the same
    number of channels, and the same number of pixels for each mid-block position. A model that has
    other UNet weights than the training's gives a warning.

    Raises:
      UserError: if the mid-blocks or the prediction types do not match.
    """
    for part in adapter.parts:
        _check_part_fits(part, backbone, resolution)


def _check_part_fits(adapter: Adapter, backbone: Backbone, resolution: int) -> None:
    trained, names = adapter.backbone, label(adapter)
    ours, theirs = adapter.module.mid_block_shape, tuple(backbone.mid_block_shape(resolution))
    alike = ours[2] == theirs[2] and trained["resolution"] * theirs[0] == resolution * ours[0]
    if not alike or (adapter.module.kind == "constant" and ours != theirs):
        fix = (
            f"generate at resolution {trained['resolution']}"
            if alike
            else f"use the model that it was trained on, {trained['name']}"
        )
        raise UserError(
            f"the adapter ({names}) has mid-block shape (H, W, C) = {ours} at resolution"
            f" {trained['resolution']}, but {backbone.identity['name']} at resolution {resolution}"
            f" has {theirs}; {fix}"
        )
    if trained["prediction_type"] != backbone.prediction_type:
        raise UserError(
            f"the adapter ({names}) was trained on a model that predicts"
            f" {trained['prediction_type']!r}, but {backbone.identity['name']} predicts"
            f" {backbone.prediction_type!r}; use {trained['name']}"
        )
    if trained["unet_sha256"] != backbone.identity["unet_sha256"]:
        warnings.warn(
            f"the adapter ({names}) was trained on {trained['name']}, whose UNet weights differ"
            f" from those of {backbone.identity['name']}: the effect may be weaker or different",
            stacklevel=3,
        )
