"""The two files of an adapter directory: what they hold, and reading them with suspicion.

* `adapter_model.safetensors`: float32 or float16 tensors in PyTorch's layouts, so that the other
  side need not know of Flax. For concept number `i` and role `ram` or `sam`

      constant   concepts.{i}.{role}.constant        (C, H, W)
      mlp        concepts.{i}.{role}.hidden.weight   (hidden, C)        .hidden.bias (hidden,)
                 concepts.{i}.{role}.out.weight      (C, hidden)        .out.bias    (C,)
      conv       concepts.{i}.{role}.hidden.weight   (hidden, C, 3, 3)  .hidden.bias (hidden,)
                 concepts.{i}.{role}.out.weight      (C, hidden, 3, 3)  .out.bias    (C,)

* `adapter_config.json`: format version, module, backbone, concepts with their recipes and default
  scales, the rule of use (what is added to the conditional half of the guidance batch only), a
  training summary, what was measured.

What is wrong in them is a `ValueError` that names the file; nothing here reads or writes a pickle.
"""

import json
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from respodiff_jax.errors import UserError
from respodiff_jax.method.modules import MidBlockModule, Params
from respodiff_jax.storage import local_copy

FORMAT = "respodiff-adapter"
FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

DTYPES = ("float32", "float16")
METRIC_KEYS = ("metric", "attribute", "images", "value", "interval", "n")

_SECTIONS = ("module", "backbone", "guidance", "concepts", "training")
_OPTIONAL = ("metrics",)
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
BACKBONE_KEYS = tuple(_BACKBONE_TYPES)
ROLES = ("ram", "sam")
# How each Flax parameter, known by its rank, is transposed for PyTorch: bias, Dense kernel
# (in, out), constant (H, W, C), Conv kernel (H, W, in, out).
TO_TORCH = {1: (0,), 2: (1, 0), 3: (2, 0, 1), 4: (3, 2, 0, 1)}
CFG_RULE = {
    "steered_half": "conditional",
    "formula": "h_cond + sum_i scale_i * (RAM_i(h_cond) + SAM_i(h_cond)), at every sampling step",
}


def param_shapes(module: MidBlockModule) -> dict[str, tuple[int, ...]]:
    """Shape of each of one concept's Flax parameters, by its dotted name."""
    params = jax.eval_shape(module.init_params, jax.random.key(0))
    return {key: leaf.shape for key, leaf in flatten_dict(params, sep=".").items()}


def tensor_key(index: int, role: str, key: str) -> str:
    """The file's name of a concept's Flax parameter."""
    return f"concepts.{index}.{role}.{key.replace('kernel', 'weight')}"


def read_config(path: epath.Path) -> dict[str, Any]:
    """The config, of a version that is known and with all of its sections; concepts unchecked.

    Raises:
      UserError: naming the file and what is wrong in it.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f'{path.name} does not say "format": "{FORMAT}"')
    version = config.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise UserError(f"{path.name}: format_version is {version!r}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path.name}: format_version is {version}, this version of respodiff_jax reads up to"
            f" {FORMAT_VERSION}; update respodiff_jax"
        )
    keys = config.keys() - set(_OPTIONAL)
    check_keys(path.name, keys, ("format", "format_version", *_SECTIONS))
    if not isinstance(config["concepts"], list):
        raise UserError(f"{path.name}: concepts is {config['concepts']!r}, expected a list")
    for section in ("module", "backbone", "guidance"):
        if not isinstance(config[section], dict):
            raise UserError(f"{path.name}: {section} is {config[section]!r}, expected a mapping")
    check_keys(f"{path.name}: module", config["module"], _MODULE_KEYS)
    shape = config["module"]["mid_block_shape"]
    check_keys(f"{path.name}: mid_block_shape", shape, ("channels", "height", "width"))
    for axis, size in shape.items():
        if type(size) is not int or size < 1:
            raise UserError(f"{path.name}: mid_block_shape {axis} is {size!r}, expected 1 or more")
    for key, kind in _BACKBONE_TYPES.items():
        value = config["backbone"].get(key, kind())
        if type(value) is not kind and not (value is None and key in _MAY_BE_NULL):
            raise UserError(f"{path.name}: backbone {key} is {value!r}, expected {kind.__name__}")
    if not isinstance(config["training"], dict | None):
        raise UserError(f"{path.name}: training is {config['training']!r}, expected a mapping")
    for entry in config.get("metrics") or ():
        check_keys(f"{path.name}: metrics", entry, METRIC_KEYS)
        interval = entry["interval"] or (0.0, 0.0)
        if len(interval) != 2 or not all(map(is_finite, (entry["value"], *interval))):
            raise UserError(f"{path.name}: metrics are not finite numbers: {entry}")
    half = config["guidance"].get("steered_half")
    if half != CFG_RULE["steered_half"]:
        raise UserError(f"{path.name}: guidance steered_half is {half!r}, expected 'conditional'")
    return config


def read_weights(
    path: epath.Path, module: MidBlockModule, num_concepts: int
) -> tuple[Params, Params, str]:
    """RAM and SAM parameters, leaves `(num_concepts, ...)`, float32, and the dtype of the file.

    Raises:
      UserError: when the file is not whole, or tensors are missing, extra or of other shapes.
    """
    shapes = param_shapes(module)
    expected = {
        tensor_key(i, role, key): tuple(shape[axis] for axis in TO_TORCH[len(shape)])
        for i in range(num_concepts)
        for role in ROLES
        for key, shape in shapes.items()
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
    except SafetensorError as error:
        raise UserError(
            f"{path.name} is not a whole safetensors file ({error}); it is damaged or truncated:"
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
    half = all(tensor.dtype == np.float16 for tensor in tensors.values())
    return ram, sam, "float16" if half else "float32"


def is_finite(value: Any) -> bool:
    """Whether it is a number that float32 can hold."""
    return isinstance(value, int | float) and abs(value) <= float(np.finfo(np.float32).max)


def check_keys(what: str, actual: Any, expected: Any) -> None:
    """Raises a ValueError that lists missing and extra keys."""
    missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    if missing or extra:
        raise UserError(
            f"{what} does not have the expected keys; missing: {missing}, extra: {extra}"
        )
