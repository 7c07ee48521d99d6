"""Adapters: trained concepts as a small directory, apart from the frozen model they belong to.

An adapter directory holds two files:

* `adapter_model.safetensors`: float32 (float16 is read too) tensors in PyTorch's layouts, so that
  the other side need not know of Flax. For concept number `i` and role `ram` or `sam`

      constant   concepts.{i}.{role}.constant        (C, H, W)
      mlp        concepts.{i}.{role}.hidden.weight   (hidden, C)        .hidden.bias (hidden,)
                 concepts.{i}.{role}.out.weight      (C, hidden)        .out.bias    (C,)
      conv       concepts.{i}.{role}.hidden.weight   (hidden, C, 3, 3)  .hidden.bias (hidden,)
                 concepts.{i}.{role}.out.weight      (C, hidden, 3, 3)  .out.bias    (C,)

* `adapter_config.json`: format version, module, backbone, concepts with their recipes, the rule of
  use (what is added to the conditional half of the guidance batch only), a training summary.

The same adapter always gives the same bytes, and nothing here reads or writes a pickle.
"""

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from respodiff_jax.backbone import Backbone
from respodiff_jax.concepts import Concept, validate_concepts
from respodiff_jax.modules import MidBlockModule, Params, Steering

FORMAT = "respodiff-adapter"
FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_SECTIONS = ("module", "backbone", "guidance", "concepts", "training")
_MODULE_KEYS = ("kind", "mid_block_shape", "hidden_channels")
_BACKBONE_KEYS = ("name", "revision", "variant", "unet_sha256", "resolution", "prediction_type")
_ROLES = ("ram", "sam")
# How each Flax parameter, known by its rank, is transposed for PyTorch: bias, Dense kernel
# (in, out), constant (H, W, C), Conv kernel (H, W, in, out).
_TO_TORCH = {1: (0,), 2: (1, 0), 3: (2, 0, 1), 4: (3, 2, 0, 1)}
_CFG_RULE = {
    "steered_half": "conditional",
    "formula": "h_cond + sum_i scale_i * (RAM_i(h_cond) + SAM_i(h_cond)), at every sampling step",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """Trained RAM and SAM of N concepts.

    Attributes:
      concepts: the N concepts, in the order of the parameters' leading axis.
      module: architecture of every RAM and SAM.
      ram: RAM parameters, leaves `(N, ...)`, float32 numpy.
      sam: SAM parameters, likewise.
      backbone: `Backbone.identity` of the model trained on, `resolution` and `prediction_type`.
      training: JSON-able summary of the training run, or None.

    Raises:
      ValueError: when parameters do not fit the module or the concepts, or are not finite.
    """

    concepts: tuple[Concept, ...]
    module: MidBlockModule
    ram: Params
    sam: Params
    backbone: Mapping[str, Any]
    training: Mapping[str, Any] | None = None

    def __post_init__(self):
        validate_concepts(self.concepts)
        _check_keys("adapter backbone", self.backbone, _BACKBONE_KEYS)
        shapes = _param_shapes(self.module)
        for role in _ROLES:
            flat = flatten_dict(getattr(self, role), sep=".")
            _check_keys(f"adapter {role} of kind {self.module.kind!r}", flat, shapes)
            for key, value in flat.items():
                expected = (len(self.concepts), *shapes[key])
                if np.shape(value) != expected:
                    raise ValueError(
                        f"adapter {role}.{key} has shape {np.shape(value)}, expected {expected} for"
                        f" {len(self.concepts)} concepts of mid-block {self.module.mid_block_shape}"
                    )
                flat[key] = np.asarray(value, np.float32)
                for concept, values in zip(self.concepts, flat[key], strict=True):
                    if not np.isfinite(values).all():
                        raise ValueError(
                            f"adapter concept {concept.name!r}: {role}.{key} holds NaN or infinity;"
                            " the training run diverged or the file is damaged"
                        )
            object.__setattr__(self, role, unflatten_dict(flat, sep="."))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(concept.name for concept in self.concepts)

    def steering(self, weights: Any, ram: float = 1.0, sam: float = 1.0) -> Steering:
        """What to add at the mid-block, for a batch.

        Args:
          weights: `(B, N)`, weight of each concept in each sample.
          ram: factor on every RAM (0 switches RAM off).
          sam: factor on every SAM.

        Raises:
          ValueError: when `weights` is not `(B, N)`.
        """
        if np.ndim(weights) != 2 or np.shape(weights)[1] != len(self.concepts):
            raise ValueError(
                f"weights have shape {np.shape(weights)}, expected (batch, {len(self.concepts)})"
                f" for the concepts {', '.join(self.names)}"
            )
        weights = jnp.asarray(weights, jnp.float32)
        return Steering(self.ram, self.sam, weights * ram, weights * sam)


def save_adapter(
    adapter: Adapter, directory: str | os.PathLike, training: Mapping[str, Any] | None = None
) -> None:
    """Writes an adapter directory, made if it does not exist; an older adapter in it is replaced.

    Args:
      adapter: what to save.
      directory: where to.
      training: a JSON-able training summary, instead of the adapter's own.
    """
    tensors = {}
    for role in _ROLES:
        for key, stacked in flatten_dict(getattr(adapter, role), sep=".").items():
            for i, value in enumerate(stacked):
                torch_value = value.transpose(_TO_TORCH[value.ndim])
                tensors[_tensor_key(i, role, key)] = np.ascontiguousarray(torch_value)
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
        "guidance": _CFG_RULE,
        "concepts": [
            concept.to_dict() | {"slug": slug}
            for concept, slug in zip(adapter.concepts, slugs, strict=True)
        ],
        "training": adapter.training if training is None else training,
    }
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / WEIGHTS_FILE, safetensors.numpy.save(tensors, {"format": "pt"}))
    _replace(directory / CONFIG_FILE, text.encode())


def load_adapter(directory: str | os.PathLike) -> Adapter:
    """Reads an adapter directory.

    Raises:
      ValueError: naming the file and what is wrong in it: missing, truncated, of a newer format,
        missing or unknown keys, wrong shapes, values that are not finite.
    """
    directory = epath.Path(directory)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / file).is_file():
            raise ValueError(
                f"{directory} is not an adapter directory: it has no {file}; expected what"
                " `respodiff train` or `respodiff export` wrote"
            )
    try:
        config = _read_config(directory / CONFIG_FILE)
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
        ram, sam = _read_weights(directory / WEIGHTS_FILE, module, len(concepts))
        return Adapter(concepts, module, ram, sam, config["backbone"], config["training"])
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"adapter {directory}: {error}") from error


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter with the concepts of several; the first one's backbone stands for all.

    Raises:
      ValueError: when kinds or shapes differ, or a concept name comes twice.
    """
    first = adapters[0]
    for other in adapters[1:]:
        for what, a, b in (
            ("module kinds", first.module.kind, other.module.kind),
            ("mid-block shapes", first.module.mid_block_shape, other.module.mid_block_shape),
            ("hidden channels", _hidden_channels(first.module), _hidden_channels(other.module)),
        ):
            if a != b:
                raise ValueError(
                    f"adapters cannot be used together: their {what} are {a!r} ({_label(first)})"
                    f" and {b!r} ({_label(other)}); use adapters trained alike"
                )
    if len(adapters) == 1:
        return first
    ram, sam = (
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *(getattr(a, role) for a in adapters))
        for role in _ROLES
    )
    concepts = tuple(concept for adapter in adapters for concept in adapter.concepts)
    return Adapter(concepts, first.module, ram, sam, first.backbone)


def check_fits(adapter: Adapter, backbone: Backbone, resolution: int) -> None:
    """Checks that an adapter can steer a model at a resolution.

    A `constant` needs the mid-block shape that it was trained at, `mlp` and `conv` only its
    channels. A model other than the one trained on, of that shape, is allowed, with a warning.

    Raises:
      ValueError: when the mid-block shapes or the prediction types differ.
    """
    trained, label = adapter.backbone, _label(adapter)
    ours, theirs = adapter.module.mid_block_shape, tuple(backbone.mid_block_shape(resolution))
    compared = slice(None) if adapter.module.kind == "constant" else slice(2, None)
    if ours[compared] != theirs[compared]:
        fix = (
            f"generate at resolution {trained['resolution']}"
            if ours[2] == theirs[2]
            else f"use the model that it was trained on, {trained['name']}"
        )
        raise ValueError(
            f"the adapter ({label}) has mid-block shape (H, W, C) = {ours}, but"
            f" {backbone.identity['name']} at resolution {resolution} has {theirs}; {fix}"
        )
    prediction_type = backbone.scheduler_config.get("prediction_type", "epsilon")
    if trained["prediction_type"] != prediction_type:
        raise ValueError(
            f"the adapter ({label}) was trained on a model that predicts"
            f" {trained['prediction_type']!r}, but {backbone.identity['name']} predicts"
            f" {prediction_type!r}; use {trained['name']}"
        )
    if trained["unet_sha256"] != backbone.identity["unet_sha256"]:
        warnings.warn(
            f"the adapter ({label}) was trained on {trained['name']}, whose UNet weights differ"
            f" from those of {backbone.identity['name']}: its effect may be weaker or different",
            stacklevel=2,
        )


def _param_shapes(module: MidBlockModule) -> dict[str, tuple[int, ...]]:
    """Shape of each of one concept's Flax parameters, by its dotted name."""
    params = jax.eval_shape(module.init_params, jax.random.key(0))
    return {key: leaf.shape for key, leaf in flatten_dict(params, sep=".").items()}


def _hidden_channels(module: MidBlockModule) -> int | None:
    """The inner width that is in effect, None for `constant`."""
    if module.kind == "constant":
        return None
    return _param_shapes(module)["hidden.bias"][0]


def _tensor_key(index: int, role: str, key: str) -> str:
    return f"concepts.{index}.{role}.{key.replace('kernel', 'weight')}"


def _label(adapter: Adapter) -> str:
    return ", ".join(adapter.names)


def _slugs(names: Sequence[str]) -> list[str]:
    """A distinct name for each concept that is safe in file names, URLs and code."""
    slugs: list[str] = []
    for name in names:
        slug = base = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "concept"
        number = 2
        while slug in slugs:
            slug, number = f"{base}-{number}", number + 1
        slugs.append(slug)
    return slugs


def _replace(path: epath.Path, content: bytes) -> None:
    """Writes a file so that it is never seen half-written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f'{path.name} does not say "format": "{FORMAT}"')
    version = config.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{path.name}: format_version is {version!r}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path.name}: format_version is {version}, this version of respodiff_jax reads up to"
            f" {FORMAT_VERSION}; update respodiff_jax"
        )
    _check_keys(path.name, config, ("format", "format_version", *_SECTIONS))
    for section in ("module", "backbone", "guidance"):
        if not isinstance(config[section], dict):
            raise ValueError(f"{path.name}: {section} is {config[section]!r}, expected a mapping")
    _check_keys(f"{path.name}: module", config["module"], _MODULE_KEYS)
    shape = config["module"]["mid_block_shape"]
    _check_keys(f"{path.name}: mid_block_shape", shape, ("channels", "height", "width"))
    for axis, size in shape.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{path.name}: mid_block_shape {axis} is {size!r}, expected 1 or more")
    half = config["guidance"].get("steered_half")
    if half != _CFG_RULE["steered_half"]:
        raise ValueError(f"{path.name}: guidance steered_half is {half!r}, expected 'conditional'")
    return config


def _read_weights(
    path: epath.Path, module: MidBlockModule, num_concepts: int
) -> tuple[Params, Params]:
    """RAM and SAM parameters, leaves `(num_concepts, ...)`, from a safetensors file."""
    shapes = _param_shapes(module)
    expected = {
        _tensor_key(i, role, key): tuple(shape[axis] for axis in _TO_TORCH[len(shape)])
        for i in range(num_concepts)
        for role in _ROLES
        for key, shape in shapes.items()
    }
    try:
        with safe_open(path, framework="numpy") as file:
            _check_keys(path.name, file.keys(), expected)
            for key, shape in expected.items():
                entry = file.get_slice(key)
                if tuple(entry.get_shape()) != shape or entry.get_dtype() not in ("F32", "F16"):
                    raise ValueError(
                        f"{path.name}: {key} is {entry.get_dtype()} {tuple(entry.get_shape())},"
                        f" expected F32 or F16 {shape}"
                    )
            tensors = {key: file.get_tensor(key) for key in expected}
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is not a whole safetensors file ({error}); it is damaged or truncated:"
            " copy or export it again"
        ) from error

    def stack(role: str, key: str, rank: int) -> np.ndarray:
        to_flax = np.argsort(_TO_TORCH[rank])
        per_concept = [tensors[_tensor_key(i, role, key)] for i in range(num_concepts)]
        return np.stack([value.transpose(to_flax) for value in per_concept]).astype(np.float32)

    ram, sam = (
        unflatten_dict({k: stack(role, k, len(s)) for k, s in shapes.items()}, sep=".")
        for role in _ROLES
    )
    return ram, sam


def _check_keys(what: str, actual: Any, expected: Any) -> None:
    """Raises a ValueError that lists missing and extra keys."""
    missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    if missing or extra:
        raise ValueError(
            f"{what} does not have the expected keys; missing: {missing}, extra: {extra}"
        )
