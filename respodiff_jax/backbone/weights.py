"""Converts weight files of diffusers and transformers to Flax parameter trees and back, without
torch.

The parameter tree of the Flax module says what to read. `torch_names` gives the PyTorch names of
each leaf, and `_to_flax` converts the layout.
"""

import functools
import json
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping

import flax.serialization
import flax.traverse_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from respodiff_jax.errors import UserError
from respodiff_jax.storage import check_regular

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# The names of the two layers of a time embedding, not list entries.
_UNSPLIT = ("linear_1", "linear_2")
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Names of the scales of quantised weights.
SCALES = re.compile(r"scale_weight$|weight_scale$|scaled_fp8$|\bSCB$|absmax$")
_IGNORED = re.compile(r".*\bposition_ids$")  # a buffer that old transformers versions saved

# Numbers of one byte, which `safetensors.numpy` does not read.
_BYTE_FLOATS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}

_ALIGNMENT = 64

Path = tuple[str, ...]
# By name: the file that holds a tensor, and a function that reads the tensor.
Stored = dict[str, tuple[pathlib.Path, Callable[[str], np.ndarray]]]


def torch_names(path: Path) -> tuple[str, ...]:
    """The PyTorch names of a Flax parameter, the current one first.

    >>> torch_names(("down_blocks_0", "resnets_1", "conv1", "kernel"))
    ('down_blocks.0.resnets.1.conv1.weight',)
    >>> torch_names(("decoder", "mid_block", "attentions_0", "query", "bias"))
    ('decoder.mid_block.attentions.0.to_q.bias', 'decoder.mid_block.attentions.0.query.bias')
    """
    *modules, leaf = path
    modules = [m if m in _UNSPLIT else re.sub(r"_(\d+)$", r".\1", m) for m in modules]
    older = ".".join([*modules, _LEAVES.get(leaf, leaf)])
    if not modules or modules[-1] not in _VAE_ATTENTION:
        return (older,)
    return ".".join([*modules[:-1], _VAE_ATTENTION[modules[-1]], _LEAVES[leaf]]), older


def _to_flax(tensor: np.ndarray, leaf: str, ndim: int) -> np.ndarray:
    """Linear (O, I) -> (I, O), convolution (O, I, h, w) -> (h, w, I, O); 1x1 may be either."""
    if leaf != "kernel":
        return tensor
    if tensor.ndim == 4 and ndim == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    elif tensor.ndim == 2 and ndim == 4:
        tensor = tensor[:, :, None, None]
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _to_torch(array: np.ndarray, leaf: str) -> np.ndarray:
    if leaf != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose memory JAX's CPU device takes as it is, without a copy: 64 bytes aligned."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _listed(keys: Iterable[str], limit: int = 5) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"{len(keys)} ({', '.join(keys[:limit])}{more})"


def _open_safetensors(files: list[pathlib.Path]) -> Stored:
    stored = {}
    for file in files:
        check_regular(file, "weights")
        try:
            handle = safetensors.safe_open(file, framework="numpy")
        except safetensors.SafetensorError as error:
            raise UserError(
                f"{file} is truncated or not a safetensors file ({error}); download or copy it"
                " again"
            ) from error
        for name in handle.keys():  # noqa: SIM118
            is_byte = handle.get_slice(name).get_dtype() in _BYTE_FLOATS
            read = functools.partial(_read_bytes, file) if is_byte else handle.get_tensor
            stored[name] = file, read
    return stored


def _read_bytes(file: pathlib.Path, name: str) -> np.ndarray:
    """A tensor of one-byte floats, in the file's own layout: a header's size, header, data."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(size))[name]
        start, end = entry["data_offsets"]
        stream.seek(8 + size + start)
        data = stream.read(end - start)
    return np.frombuffer(data, _BYTE_FLOATS[entry["dtype"]]).reshape(entry["shape"])


def _open_msgpack(file: pathlib.Path) -> Stored:
    damaged = f"{file} is truncated or not a Flax msgpack file"
    try:
        tree = flax.serialization.msgpack_restore(file.read_bytes())
    except Exception as error:  # msgpack raises many kinds for damaged files
        raise UserError(f"{damaged} ({error}); download or copy it again") from error
    if not isinstance(tree, dict):
        raise UserError(f"{damaged}; download or copy it again")
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: (file, lambda name: np.asarray(flat.pop(name))) for name in flat}


def load_weights(files: list[pathlib.Path], abstract: Mapping, dtype: np.dtype) -> dict:
    """Reads a Flax parameter tree.

    Args:
      files: one .msgpack, or one or more .safetensors that together hold the state dict.
      abstract: the model's tree of `ShapeDtypeStruct`s.
      dtype: every parameter is cast to it.

    Returns:
      A tree like `abstract`, of numpy arrays in `dtype`, see `aligned_empty`.

    Raises:
      UserError: for missing parameters (listed, with the unknown ones), a wrong shape, or a damaged
        file. Unknown parameters alone only give a warning.
    """
    is_flax = files[0].suffix == ".msgpack"
    stored = _open_msgpack(files[0]) if is_flax else _open_safetensors(files)
    flat = flax.traverse_util.flatten_dict(abstract)
    names = {path: ("/".join(path),) if is_flax else torch_names(path) for path in flat}
    found = {path: next((n for n in names[path] if n in stored), None) for path in flat}

    where = files[0] if len(files) == 1 else files[0].parent
    missing = [names[path][0] for path, name in found.items() if name is None]
    unknown = {name for name in stored if not _IGNORED.match(name)} - set(found.values())
    if missing:
        also = f"; it holds unknown ones: {_listed(unknown)}" if unknown else ""
        raise UserError(
            f"{where} lacks parameters of the model in config.json: {_listed(missing)}{also}. "
            "The weights and the config belong to different models"
        )
    if scales := {name for name in unknown if SCALES.search(name)}:
        raise UserError(
            f"{where} is quantised with scales, which the model would ignore: {_listed(scales)}."
            " Use the file in float16, bfloat16 or float32"
        )
    if unknown:
        warnings.warn(
            f"{where} holds parameters that the model ignores: {_listed(unknown)}", stacklevel=2
        )

    loaded = {}
    for path, name in found.items():
        file, read = stored[name]
        expected = flat[path].shape
        array = read(name)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(
                f"{file}: {name} is {array.dtype}, expected floating-point numbers; quantised"
                " models are not supported"
            )
        if not is_flax:
            array = _to_flax(array, path[-1], len(expected))
        if array.shape != expected:
            raise UserError(
                f"{file}: {name} has shape {array.shape} in Flax's layout, the model in config.json"
                f" expects {expected}"
            )
        loaded[path] = aligned_empty(expected, dtype)
        np.copyto(loaded[path], array, casting="unsafe")
    return flax.traverse_util.unflatten_dict(loaded)


def save_weights(params: Mapping, path: str | pathlib.Path, dtype: str = "float32") -> None:
    """Writes a Flax tree as one .safetensors file with PyTorch's names and layouts.

    diffusers (UNet, VAE) and transformers (CLIP, its text encoder) read the file, as
    `diffusion_pytorch_model.safetensors` and `model.safetensors`. So does `load_backbone`. The
    dtype is "float32", "float16" or "bfloat16".
    """
    tensors = {
        torch_names(key)[0]: np.array(_to_torch(np.asarray(value), key[-1]), dtype, order="C")
        for key, value in flax.traverse_util.flatten_dict(params).items()
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
