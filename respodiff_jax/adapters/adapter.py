"""Adapters: trained concepts, saved as a small directory without the frozen model.

`adapters.files` describes the two files of the directory, `adapters.card` the files that
`respodiff export` adds for readers. The same adapter always gives the same bytes.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float32

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
from respodiff_jax.errors import UserError, check_choice
from respodiff_jax.method.concepts import Concept, validate_concepts
from respodiff_jax.method.modules import MidBlockModule, Params
from respodiff_jax.method.reading import HEADS, Reading
from respodiff_jax.storage import PathLike, open_path, read_json, write_whole


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
      metrics: measurements of this adapter, each with the keys `METRIC_KEYS` of
        `evaluation.results.Measurement.to_dict`; or None.
      dtype: dtype of the saved parameters, one of `DTYPES`.
      reading: the heads that read prompts, float32 numpy; None steers every prompt, as the paper
        does.
      reading_accuracy: group -> head ("somebody", "thing", "value") -> held-out AUROC, where it is
        known.

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
    metrics: Sequence[Mapping[str, Any]] | None = None
    dtype: str = "float32"
    reading: Reading | None = None
    reading_accuracy: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        validate_concepts(self.concepts)
        check_choice("adapter dtype", self.dtype, DTYPES)
        check_backbone(self.backbone)
        if not isinstance(self.training, Mapping | None):
            raise UserError(f"adapter training is {self.training!r:.80}, not a mapping or null")
        if self.metrics is not None:
            check_metrics(self.metrics)
        _check_json("backbone", dict(self.backbone))
        _check_json("training", self.training)
        _check_json("metrics", self.metrics)
        self._check_reading()
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

    def _check_reading(self):
        if not _are_accuracies(self.reading_accuracy):
            raise UserError(
                f"adapter reading accuracy is {self.reading_accuracy!r:.80}, expected group -> head"
                " -> a number"
            )
        if self.reading is None:
            return
        weight, bias = (np.asarray(leaf, np.float32) for leaf in self.reading)
        heads = len(self.concepts), len(HEADS)
        if weight.ndim != 3 or weight.shape[:2] != heads or bias.shape != heads:
            raise UserError(
                f"adapter reading has weights {weight.shape} and biases {bias.shape}, expected"
                f" {(*heads, 'D')} and {heads}"
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise UserError("adapter reading holds NaN or infinity; the file is damaged")
        object.__setattr__(self, "reading", Reading(weight, bias))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(concept.name for concept in self.concepts)

    @property
    def default_scales(self) -> tuple[float, ...]:
        """The weight of each concept for which the user gives none."""
        return tuple(concept.default_scale for concept in self.concepts)

    @property
    def max_timesteps(self) -> Float32[np.ndarray, "N"] | None:
        """The largest timestep at which each concept steers, maybe infinite; None if all are."""
        last = [np.inf if c.max_timestep is None else c.max_timestep for c in self.concepts]
        return None if min(last) == np.inf else np.float32(last)

    @property
    def parts(self) -> tuple["Adapter", ...]:
        """Itself: an adapter is a `combined.CombinedAdapter` of one part."""
        return (self,)


def save_adapter(adapter: Adapter, directory: PathLike) -> None:
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
    for i in range(len(adapter.concepts) if adapter.reading else 0):
        for key, stacked in adapter.reading._asdict().items():
            tensors[tensor_key(i, "reading", key)] = np.ascontiguousarray(stacked[i])
    height, width, channels = adapter.module.mid_block_shape
    slugs = _slugs(adapter.names)
    version, guidance = 1 if adapter.reading is None else 2, dict(CFG_RULE)
    if adapter.max_timesteps is not None:
        version, guidance["formula"] = FORMAT_VERSION, f"{CFG_RULE['formula']} up to max_timestep_i"
    config = {
        "format": FORMAT,
        "format_version": version,
        "module": {
            "kind": adapter.module.kind,
            "mid_block_shape": {"channels": channels, "height": height, "width": width},
            "hidden_channels": hidden_channels(adapter.module),
        },
        "backbone": dict(adapter.backbone),
        "guidance": guidance,
        "concepts": [
            concept.to_dict() | {"slug": slug, "default_scale": concept.default_scale}
            for concept, slug in zip(adapter.concepts, slugs, strict=True)
        ],
        "training": adapter.training,
        "metrics": adapter.metrics,
    }
    if adapter.reading is not None:
        config["reading"] = {
            "text_features": adapter.reading.weight.shape[-1],
            "accuracy": {group: dict(heads) for group, heads in adapter.reading_accuracy.items()},
        }
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    contents = {WEIGHTS_FILE: safetensors.numpy.save(tensors, {"format": "pt"})}
    contents[CONFIG_FILE] = text.encode()
    directory = open_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_whole(directory / name, content)


def load_adapter(directory: PathLike) -> Adapter:
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
                " `respodiff train` or `respodiff export` wrote. A training writes its adapter when"
                " it ends, and its checkpoints before"
            )
    config = read_json(directory / CONFIG_FILE, "adapter config")
    try:
        check_config(config)
        shape = config["module"]["mid_block_shape"]
        module = MidBlockModule(
            kind=config["module"]["kind"],
            mid_block_shape=(shape["height"], shape["width"], shape["channels"]),
            hidden_channels=config["module"]["hidden_channels"],
        )
        concepts = tuple(
            Concept.from_dict({k: v for k, v in fields.items() if k != "slug"})
            for fields in config["concepts"]
        )
        validate_concepts(concepts)
        read = config.get("reading") or {"text_features": None, "accuracy": {}}
        ram, sam, reading, dtype = read_weights(
            directory / WEIGHTS_FILE, module, len(concepts), read["text_features"]
        )
        adapter = Adapter(
            concepts=concepts,
            module=module,
            ram=ram,
            sam=sam,
            backbone=config["backbone"],
            training=config["training"],
            metrics=config.get("metrics"),
            dtype=dtype,
            reading=reading,
            reading_accuracy=read["accuracy"],
        )
        _check_json("config", config)  # also what the adapter does not keep
        return adapter
    except UserError as error:
        raise UserError(f"adapter {directory}: {error}") from error


def hidden_channels(module: MidBlockModule) -> int | None:
    """The inner width in use, None for `constant`."""
    shapes = param_shapes(module)
    return next((shape[0] for key, shape in shapes.items() if key.endswith("hidden.bias")), None)


def _check_json(field: str, value: Any) -> None:
    """Raises a UserError for NaN, infinity and broken Unicode, which JSON in UTF-8 cannot hold."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise UserError(f"adapter {field} cannot be saved as JSON: {error}") from error


def _are_accuracies(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(heads, Mapping) and all(map(is_finite, heads.values()))
        for heads in value.values()
    )


def label(adapter: Adapter) -> str:
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
