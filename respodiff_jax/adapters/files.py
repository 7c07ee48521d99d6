"""The format of an adapter directory: its two files, and the checks of what they hold.

* `adapter_model.safetensors`: float32 or float16 tensors in PyTorch's layouts, so that PyTorch
  code need not know Flax. For concept number `i` and role `ram` or `sam`:

      constant   concepts.{i}.{role}.constant        (C, H, W)
      mlp        concepts.{i}.{role}.hidden.weight   (hidden, C)        .hidden.bias (hidden,)
                 concepts.{i}.{role}.out.weight      (C, hidden)        .out.bias    (C,)
      conv       concepts.{i}.{role}.hidden.weight   (hidden, C, 3, 3)  .hidden.bias (hidden,)
                 concepts.{i}.{role}.out.weight      (C, hidden, 3, 3)  .out.bias    (C,)

  and, where the adapter reads prompts, for the D features of a text state and the three heads of
  `method.reading`, in float32:

      concepts.{i}.reading.weight (3, D)   concepts.{i}.reading.bias (3,)

* `adapter_config.json`: format version, module, backbone, concepts with their hyper-parameters and
  default scales and largest timesteps, the guidance rule (the modules act on the conditional half
  of the guidance batch only), a training summary, metrics; of a reading, D and its held-out
  accuracy.

Both files may come from strangers: nothing here unpickles, and a wrong file is a `UserError`.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from respodiff_jax.errors import UserError, shortened
from respodiff_jax.method.modules import MidBlockModule, Params
from respodiff_jax.method.reading import HEADS, Reading
from respodiff_jax.storage import local_copy

FORMAT = "respodiff-adapter"
FORMAT_VERSION = 3  # version 1 has no reading, and 2 no max_timestep
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

DTYPES = ("float32", "float16")
METRIC_KEYS = ("metric", "attribute", "images", "value", "interval", "n")

_SECTIONS = ("module", "backbone", "guidance", "concepts", "training")
_OPTIONAL = ("metrics", "reading")
_MODULE_KEYS = ("kind", "mid_block_shape", "hidden_channels")
_BACKBONE_TYPES = {
    "name": str,
    "revision": str,
    "variant": str,
    "unet_sha256": str,
    "resolution": int,
    "prediction_type": str,
}
_MAY_BE_NULL = ("revision", "variant")
_MAX_SIZE = 2**31 - 1  # of an axis; JAX takes no more than int64
ROLES = ("ram", "sam")
# Axes that turn a Flax parameter into PyTorch's, by rank: bias, Dense kernel (in, out), constant
# (H, W, C), Conv kernel (H, W, in, out).
TO_TORCH = {1: (0,), 2: (1, 0), 3: (2, 0, 1), 4: (3, 2, 0, 1)}
CFG_RULE = {
    "steered_half": "conditional",
    "formula": "h_cond + sum_i scale_i * (RAM_i(h_cond) + SAM_i(h_cond)), at every sampling step",
}


@functools.cache
def param_shapes(module: MidBlockModule) -> dict[str, tuple[int, ...]]:
    """Shapes of one concept's Flax parameters, by dotted name."""
    params = jax.eval_shape(module.init_params, jax.random.key(0))
    return {key: leaf.shape for key, leaf in flatten_dict(params, sep=".").items()}


def tensor_key(index: int, role: str, key: str) -> str:
    """The key in the file of a concept's Flax parameter."""
    return f"concepts.{index}.{role}.{key.replace('kernel', 'weight')}"


def check_config(config: Any) -> None:
    """Checks the content of `adapter_config.json`.

    `Concept` and `Adapter` check the fields that they take from it.

    Raises:
      UserError: if the version is unknown, a section is missing or extra, or has the wrong type.
    """
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f'{CONFIG_FILE} does not say "format": "{FORMAT}"')
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise UserError(
            f"{CONFIG_FILE}: format_version is {version!r:.80}, expected {FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise UserError(
            f"{CONFIG_FILE}: format_version is {version}, but this version of respodiff_jax reads"
            f" up to {FORMAT_VERSION}; update respodiff_jax"
        )
    keys = config.keys() - set(_OPTIONAL)
    check_keys(CONFIG_FILE, keys, ("format", "format_version", *_SECTIONS))
    for section in ("module", "backbone", "guidance"):
        _check_type(f"{CONFIG_FILE}: {section}", config[section], dict)
    _check_type(f"{CONFIG_FILE}: concepts", config["concepts"], list)
    for concept in config["concepts"]:
        _check_type(f"{CONFIG_FILE}: a concept", concept, dict)
        if not is_finite(scale := concept.get("default_scale", 1.0)):
            raise UserError(
                f"{CONFIG_FILE}: concept {concept.get('name')!r:.100}: default_scale is"
                f" {scale!r:.100}, expected a finite number of float32"
            )
    module = config["module"]
    check_keys(f"{CONFIG_FILE}: module", module, _MODULE_KEYS)
    _check_type(f"{CONFIG_FILE}: mid_block_shape", module["mid_block_shape"], dict)
    check_keys(
        f"{CONFIG_FILE}: mid_block_shape",
        module["mid_block_shape"],
        ("channels", "height", "width"),
    )
    for axis, size in module["mid_block_shape"].items():
        _check_size(f"{CONFIG_FILE}: mid_block_shape {axis}", size)
    if module["hidden_channels"] is not None:
        _check_size(f"{CONFIG_FILE}: hidden_channels", module["hidden_channels"])
    if (reading := config.get("reading")) is not None:
        _check_type(f"{CONFIG_FILE}: reading", reading, dict)
        check_keys(f"{CONFIG_FILE}: reading", reading, ("text_features", "accuracy"))
        _check_size(f"{CONFIG_FILE}: reading text_features", reading["text_features"])
    half = config["guidance"].get("steered_half")
    if half != CFG_RULE["steered_half"]:
        raise UserError(
            f"{CONFIG_FILE}: guidance steered_half is {half!r:.80}, expected"
            f" {CFG_RULE['steered_half']!r}"
        )


def check_backbone(backbone: Mapping[str, Any]) -> None:
    """Checks keys and types of `Adapter.backbone`.

    Raises:
      UserError: naming what is missing, extra or wrong.
    """
    check_keys("adapter backbone", backbone, _BACKBONE_TYPES)
    for key, kind in _BACKBONE_TYPES.items():
        if not (backbone[key] is None and key in _MAY_BE_NULL):
            _check_type(f"adapter backbone {key}", backbone[key], kind)
    for key in ("name", "prediction_type"):
        if not backbone[key].strip():
            raise UserError(f"adapter backbone {key} is empty, expected a text")
    _check_size("adapter backbone resolution", backbone["resolution"])


def check_metrics(metrics: Any) -> None:
    """Checks keys and types of `Adapter.metrics`.

    Raises:
      UserError: naming what is missing, extra or wrong.
    """
    if not isinstance(metrics, list | tuple):
        raise UserError(f"adapter metrics is {metrics!r:.80}, expected a list or null")
    for entry in metrics:
        _check_type("adapter metrics: an entry", entry, dict)
        check_keys("adapter metrics", entry, METRIC_KEYS)
        interval = entry["interval"]
        is_interval = interval is None or (
            isinstance(interval, list | tuple)
            and len(interval) == 2
            and all(map(is_finite, interval))
        )
        if not is_finite(entry["value"]) or not is_interval:
            raise UserError(f"adapter metrics: value or interval is not finite: {entry!s:.200}")
        for key in ("metric", "images"):
            _check_type(f"adapter metrics: {key}", entry[key], str)
        if entry["attribute"] is not None:
            _check_type("adapter metrics: attribute", entry["attribute"], str)
        _check_type("adapter metrics: n", entry["n"], int)


def read_weights(
    path: epath.Path, module: MidBlockModule, num_concepts: int, text_features: int | None
) -> tuple[Params, Params, Reading | None, str]:
    """Reads `adapter_model.safetensors`.

    Returns:
      RAM parameters, SAM parameters and reading, with float32 leaves `(num_concepts, ...)`, and the
      dtype of RAM and SAM in the file. The reading is None where `text_features` is.

    Raises:
      UserError: if the file cannot be read or is cut off, or if tensors are missing, extra or have
        another shape or dtype.
    """
    shapes = param_shapes(module)
    expected = {
        tensor_key(i, role, key): tuple(shape[axis] for axis in TO_TORCH[len(shape)])
        for i in range(num_concepts)
        for role in ROLES
        for key, shape in shapes.items()
    }
    if text_features is not None:
        heads = {"weight": (len(HEADS), text_features), "bias": (len(HEADS),)}
        expected |= {
            tensor_key(i, "reading", key): shape
            for i in range(num_concepts)
            for key, shape in heads.items()
        }
    try:
        with local_copy(path) as local, safe_open(local, framework="numpy") as file:
            check_keys(path.name, file.keys(), expected)
            for key, shape in expected.items():
                entry = file.get_slice(key)
                if tuple(entry.get_shape()) != shape or entry.get_dtype() not in ("F32", "F16"):
                    raise UserError(
                        f"{path.name}: {key} is {entry.get_dtype()} {tuple(entry.get_shape())},"
                        f" expected F32 or F16 {shape}"
                    )
            tensors = {key: file.get_tensor(key) for key in expected}
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error}") from error
    except SafetensorError as error:
        raise UserError(
            f"{path.name} is not a whole safetensors file ({shortened(error)}); it is damaged or"
            " truncated:"
            " copy or export it again"
        ) from error

    def stack(role: str, key: str, rank: int) -> np.ndarray:
        to_flax = np.argsort(TO_TORCH[rank])
        per_concept = [tensors[tensor_key(i, role, key)] for i in range(num_concepts)]
        return np.stack([value.transpose(to_flax) for value in per_concept]).astype(np.float32)

    ram, sam = (
        unflatten_dict({k: stack(role, k, len(s)) for k, s in shapes.items()}, sep=".")
        for role in ROLES
    )
    reading = None
    if text_features is not None:
        reading = Reading(
            *(
                np.stack([tensors[tensor_key(i, "reading", key)] for i in range(num_concepts)])
                for key in Reading._fields
            )
        )
    half = all(
        tensor.dtype == np.float16 for key, tensor in tensors.items() if ".reading." not in key
    )
    return ram, sam, reading, "float16" if half else "float32"


def is_finite(value: Any) -> bool:
    """Whether the value is a number in float32's range."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= float(np.finfo(np.float32).max)


def check_keys(what: str, actual: Iterable[str], expected: Iterable[str]) -> None:
    """Raises a UserError that lists missing and extra keys, if there are any."""
    missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    if missing or extra:
        raise UserError(
            f"{what} does not have the expected keys; missing: {missing!s:.120}, extra:"
            f" {extra!s:.120}"
        )


_TYPE_NAMES = {dict: "a mapping", list: "a list", int: "an integer", str: "a text"}


def _check_type(what: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise UserError(f"{what} is {value!r:.80}, expected {_TYPE_NAMES[kind]}")


def _check_size(what: str, size: Any) -> None:
    if type(size) is not int or not 1 <= size <= _MAX_SIZE:
        raise UserError(f"{what} is {size!r:.80}, expected 1 .. {_MAX_SIZE}")
