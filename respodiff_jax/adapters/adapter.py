"""Adapters: trained concepts, saved as a small directory without the frozen model.

`adapters.files` describes the two files of the directory, `adapters.card` the files that
`respodiff export` adds for readers. The same adapter always gives the same bytes.
"""

import dataclasses
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from respodiff_jax.adapters.files import (
    CFG_RULE,
    CONFIG_FILE,
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    ROLES,
    TO_TORCH,
    WEIGHTS_FILE,
    check_backbone,
    check_config,
    check_keys,
    check_metrics,
    is_finite,
    param_shapes,
    read_weights,
    tensor_key,
)
from respodiff_jax.backbone import Backbone
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept, validate_concepts
from respodiff_jax.method.modules import KINDS, MidBlockModule, Params, Steering
from respodiff_jax.storage import open_path, read_json, write_whole


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """Trained RAM and SAM of N concepts.

    Attributes:
      concepts: the N concepts, in the order of the parameters' leading axis.
      module: architecture of every RAM and SAM.
      ram: RAM parameters, leaves `(N, ...)`, float32 numpy.
      sam: SAM parameters, leaves `(N, ...)`, float32 numpy.
      backbone: the model trained on, `Backbone.trained_at(resolution)`.
      training: JSON-able summary of the training run, or None.
      default_scales: N finite numbers, the weight of a concept for which the user gives none; all 1
        by default.
      metrics: measurements of this adapter, dicts with the keys `METRIC_KEYS`, which have the
        meaning of the fields of `evaluation.results.Measurement`; or None.
      dtype: dtype of the saved parameters, one of `DTYPES`.

    Raises:
      UserError: if parameters do not fit the module or the concepts or are not finite, or another
        field has the wrong type or value.
    """

    concepts: tuple[Concept, ...]
    module: MidBlockModule
    ram: Params
    sam: Params
    backbone: Mapping[str, Any]
    training: Mapping[str, Any] | None = None
    default_scales: tuple[float, ...] | None = None
    metrics: Sequence[Mapping[str, Any]] | None = None
    dtype: str = "float32"

    def __post_init__(self):
        validate_concepts(self.concepts)
        if self.dtype not in DTYPES:
            raise UserError(f"adapter dtype is {self.dtype!r}, expected one of {DTYPES}")
        check_backbone(self.backbone)
        if not isinstance(self.training, Mapping | None):
            raise UserError(f"adapter training is {self.training!r}, expected a mapping or null")
        if self.metrics is not None:
            check_metrics(self.metrics)
        _check_json("backbone", dict(self.backbone))
        _check_json("training", self.training)
        _check_json("metrics", self.metrics)
        shapes = param_shapes(self.module)
        for role in ROLES:
            flat = flatten_dict(getattr(self, role), sep=".")
            check_keys(f"adapter {role} of kind {self.module.kind!r}", flat, shapes)
            for key, value in flat.items():
                expected = (len(self.concepts), *shapes[key])
                if np.shape(value) != expected:
                    raise UserError(
                        f"adapter {role}.{key} has shape {np.shape(value)}, expected {expected} for"
                        f" {len(self.concepts)} concepts of mid-block {self.module.mid_block_shape}"
                    )
                flat[key] = np.asarray(value, np.float32)
                for concept, values in zip(self.concepts, flat[key], strict=True):
                    if not np.isfinite(values).all():
                        raise UserError(
                            f"adapter concept {concept.name!r}: {role}.{key} holds NaN or infinity;"
                            " the training diverged, or the file is damaged"
                        )
            object.__setattr__(self, role, unflatten_dict(flat, sep="."))
        if self.default_scales is None:
            object.__setattr__(self, "default_scales", (1.0,) * len(self.concepts))
        scales = self.default_scales
        if len(scales) != len(self.concepts) or not all(map(is_finite, scales)):
            raise UserError(
                f"adapter default scales are {list(scales)}, expected {len(self.concepts)} finite"
                " numbers, one for each concept"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(concept.name for concept in self.concepts)

    @property
    def parts(self) -> tuple["Adapter", ...]:
        """Itself: an adapter is a `CombinedAdapter` of one part."""
        return (self,)


def save_adapter(adapter: Adapter, directory: str | os.PathLike) -> None:
    """Writes an adapter directory, without a card.

    Args:
      adapter: the adapter to save.
      directory: made if it does not exist; an older adapter in it is replaced.

    Raises:
      UserError: for parameters beyond the range of the dtype.
    """
    tensors = {}
    for role in ROLES:
        for key, stacked in flatten_dict(getattr(adapter, role), sep=".").items():
            for i, value in enumerate(stacked):
                if np.abs(value).max() > np.finfo(adapter.dtype).max:
                    raise UserError(
                        f"adapter concept {adapter.names[i]!r}: {role}.{key} has values beyond"
                        f" {adapter.dtype}; save the adapter in float32"
                    )
                torch_value = value.transpose(TO_TORCH[value.ndim]).astype(adapter.dtype)
                tensors[tensor_key(i, role, key)] = np.ascontiguousarray(torch_value)
    height, width, channels = adapter.module.mid_block_shape
    slugs = _slugs(adapter.names)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "module": {
            "kind": adapter.module.kind,
            "mid_block_shape": {"channels": channels, "height": height, "width": width},
            "hidden_channels": _hidden_channels(adapter.module),
        },
        "backbone": dict(adapter.backbone),
        "guidance": CFG_RULE,
        "concepts": [
            concept.to_dict() | {"slug": slug, "default_scale": scale}
            for concept, slug, scale in zip(
                adapter.concepts, slugs, adapter.default_scales, strict=True
            )
        ],
        "training": adapter.training,
        "metrics": adapter.metrics,
    }
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    contents = {WEIGHTS_FILE: safetensors.numpy.save(tensors, {"format": "pt"})}
    contents[CONFIG_FILE] = text.encode()
    directory = open_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_whole(directory / name, content)


def load_adapter(directory: str | os.PathLike) -> Adapter:
    """Reads an adapter directory.

    Raises:
      UserError: if a file is missing, truncated or of a newer format, or its content is wrong; the
        message names the file and the field.
    """
    directory = open_path(directory)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / file).is_file():
            raise UserError(
                f"{directory} is not an adapter directory: it has no {file}; expected what"
                " `respodiff train` or `respodiff export` wrote"
            )
    config = read_json(directory / CONFIG_FILE, "adapter config")
    try:
        check_config(config)
        shape, kind = config["module"]["mid_block_shape"], config["module"]["kind"]
        if kind not in KINDS:
            raise UserError(f"module kind is {kind!r}, expected one of {', '.join(KINDS)}")
        module = MidBlockModule(
            kind=kind,
            mid_block_shape=(shape["height"], shape["width"], shape["channels"]),
            hidden_channels=config["module"]["hidden_channels"],
        )
        concepts = tuple(
            Concept.from_dict(
                {k: v for k, v in fields.items() if k not in ("slug", "default_scale")}
            )
            for fields in config["concepts"]
        )
        validate_concepts(concepts)
        ram, sam, dtype = read_weights(directory / WEIGHTS_FILE, module, len(concepts))
        return Adapter(
            concepts=concepts,
            module=module,
            ram=ram,
            sam=sam,
            backbone=config["backbone"],
            training=config["training"],
            default_scales=tuple(f.get("default_scale", 1.0) for f in config["concepts"]),
            metrics=config.get("metrics"),
            dtype=dtype,
        )
    except UserError as error:
        raise UserError(f"adapter {directory}: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class CombinedAdapter:
    """Adapters of different architectures that steer together. It has no file of its own.

    Attributes:
      parts: the adapters. Their concepts are numbered through.
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
    """None, one adapter or several, as a list."""
    adapters = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    for adapter in adapters:
        if not isinstance(adapter, Adapter | CombinedAdapter):
            raise UserError(f"`adapter` is {adapter!r}, expected an adapter as from `load_adapter`")
    return adapters


def combine(adapters: Sequence[Adapter]) -> Adapter | CombinedAdapter:
    """Adapters that are used together, with the concepts of all of them.

    Adapters of one architecture become one adapter, without metrics.

    Raises:
      UserError: when mid-block shapes differ, or a concept name comes twice.
    """
    first = adapters[0]
    for other in adapters[1:]:
        shapes = first.module.mid_block_shape, other.module.mid_block_shape
        if shapes[0] != shapes[1]:
            raise UserError(
                f"adapters cannot be used together: their mid-block shapes are {shapes[0]}"
                f" ({_label(first)}) and {shapes[1]} ({_label(other)}); use adapters trained alike"
            )
    validate_concepts([concept for adapter in adapters for concept in adapter.concepts])
    alike: dict[Any, list[Adapter]] = {}
    for adapter in adapters:
        kind = adapter.module.kind, _hidden_channels(adapter.module)
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
        default_scales=tuple(scale for adapter in adapters for scale in adapter.default_scales),
    )


def _common_training(adapters: Sequence[Adapter]) -> Mapping[str, Any] | None:
    first = adapters[0].training
    return first if all(adapter.training == first for adapter in adapters) else None


def steerings(
    adapter: Adapter | CombinedAdapter, weights: Any, ram: float = 1.0, sam: float = 1.0
) -> tuple[Steering, ...]:
    """What an adapter adds at the mid-block of a batch, one `Steering` for each part.

    Args:
      adapter: of N concepts.
      weights: `(B, N)`, weight of each concept in each sample.
      ram: factor on every RAM; 0 switches RAM off.
      sam: factor on every SAM.

    Raises:
      UserError: when `weights` is not `(B, N)`.
    """
    if np.ndim(weights) != 2 or np.shape(weights)[1] != len(adapter.concepts):
        raise UserError(
            f"weights have shape {np.shape(weights)}, expected (batch, {len(adapter.concepts)})"
            f" for the concepts {', '.join(adapter.names)}"
        )
    weights = np.asarray(weights, np.float32)
    ends = np.cumsum([len(part.concepts) for part in adapter.parts])
    return tuple(
        Steering(part.ram, part.sam, scales * np.float32(ram), scales * np.float32(sam))
        for part, scales in zip(adapter.parts, np.split(weights, ends[:-1], axis=1), strict=True)
    )


def check_once(only: Sequence[str]) -> None:
    """Checks that `only`, names of concepts, repeats none."""
    if twice := sorted({name for name in only if list(only).count(name) > 1}):
        raise UserError(f"`only` names {twice} more than once")


def select(adapter: Adapter | CombinedAdapter, names: Sequence[str]) -> Adapter | CombinedAdapter:
    """The adapter with these of its concepts only, in this order within each part.

    Metrics describe the whole adapter: they are dropped unless all concepts are taken.

    Raises:
      UserError: for names that the adapter lacks.
    """
    if unknown := sorted(set(names) - set(adapter.names)):
        raise UserError(f"there are no concepts {unknown}, only {_label(adapter)}")
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
        default_scales=tuple(adapter.default_scales[row] for row in rows),
        metrics=adapter.metrics if set(names) == set(adapter.names) else None,
    )


def adapter_sha256(adapter: Adapter | CombinedAdapter) -> str:
    """A digest of an adapter's concepts and parameters."""
    digest = hashlib.sha256(json.dumps([c.to_dict() for c in adapter.concepts]).encode())
    for leaf in jax.tree.leaves([(part.ram, part.sam) for part in adapter.parts]):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def check_fits(adapter: Adapter | CombinedAdapter, backbone: Backbone, resolution: int) -> None:
    """Checks that an adapter can steer a model at a resolution.

    A `constant` needs exactly the mid-block shape of the training. `mlp` and `conv` need the same
    number of channels, and the same number of pixels for each mid-block position. Any model that
    meets this is allowed; one with other UNet weights than the training's gives a warning.

    Raises:
      UserError: if the mid-blocks or the prediction types do not match.
    """
    for part in adapter.parts:
        _check_part_fits(part, backbone, resolution)


def _check_part_fits(adapter: Adapter, backbone: Backbone, resolution: int) -> None:
    trained, label = adapter.backbone, _label(adapter)
    ours, theirs = adapter.module.mid_block_shape, tuple(backbone.mid_block_shape(resolution))
    alike = ours[2] == theirs[2] and trained["resolution"] * theirs[0] == resolution * ours[0]
    if not alike or (adapter.module.kind == "constant" and ours != theirs):
        fix = (
            f"generate at resolution {trained['resolution']}"
            if alike
            else f"use the model that it was trained on, {trained['name']}"
        )
        raise UserError(
            f"the adapter ({label}) has mid-block shape (H, W, C) = {ours} at resolution"
            f" {trained['resolution']}, but {backbone.identity['name']} at resolution {resolution}"
            f" has {theirs}; {fix}"
        )
    if trained["prediction_type"] != backbone.prediction_type:
        raise UserError(
            f"the adapter ({label}) was trained on a model that predicts"
            f" {trained['prediction_type']!r}, but {backbone.identity['name']} predicts"
            f" {backbone.prediction_type!r}; use {trained['name']}"
        )
    if trained["unet_sha256"] != backbone.identity["unet_sha256"]:
        warnings.warn(
            f"the adapter ({label}) was trained on {trained['name']}, whose UNet weights differ"
            f" from those of {backbone.identity['name']}: the effect may be weaker or different",
            stacklevel=3,
        )


def _hidden_channels(module: MidBlockModule) -> int | None:
    """The inner width in use, None for `constant`."""
    shapes = param_shapes(module)
    return next((shape[0] for key, shape in shapes.items() if key.endswith("hidden.bias")), None)


def _check_json(field: str, value: Any) -> None:
    """Raises a UserError for NaN, infinity and broken Unicode, which JSON in UTF-8 cannot hold."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise UserError(f"adapter {field} cannot be saved as JSON: {error}") from error


def _label(adapter: Adapter) -> str:
    return ", ".join(adapter.names)


def _slugs(names: Sequence[str]) -> list[str]:
    """One distinct name for each concept, safe in file names, URLs and code."""
    slugs: list[str] = []
    for name in names:
        slug = base = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "concept"
        number = 2
        while slug in slugs:
            slug, number = f"{base}-{number}", number + 1
        slugs.append(slug)
    return slugs
