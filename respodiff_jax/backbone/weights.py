"""Weight files of diffusers and transformers <-> Flax parameter trees, tensor by tensor and without
torch.

The Flax module's own tree says what to read: each of its leaves has one name (or an older one) in a
PyTorch state dict, found by `torch_names`, and one layout.
"""

import json
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping

import flax.serialization
import flax.traverse_util
import ml_dtypes  # noqa: F401  numpy learns bfloat16 from it
import numpy as np
import safetensors
import safetensors.numpy

from respodiff_jax.errors import UserError

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# The names of the two layers of a time embedding, not list entries.
_UNSPLIT = ("linear_1", "linear_2")
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_IGNORED = re.compile(r".*\bposition_ids$")  # a buffer that old transformers versions saved

Path = tuple[str, ...]


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


def _listed(keys: Iterable[str], limit: int = 5) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"{len(keys)} ({', '.join(keys[:limit])}{more})"


def _check_keys(missing: Iterable[str], extra: Iterable[str], where: str) -> None:
    if missing:
        also = f"; it holds unknown ones: {_listed(extra)}" if extra else ""
        raise UserError(
            f"{where} lacks parameters of the model in config.json: {_listed(missing)}{also}. "
            "The weights and the config belong to different models."
        )
    if extra:
        warnings.warn(
            f"{where} holds parameters that the model ignores: {_listed(extra)}.", stacklevel=2
        )


def _checked(array: np.ndarray, expected: tuple[int, ...], name: str, where: str) -> np.ndarray:
    if array.shape != expected:
        raise UserError(
            f"{where}: {name} has shape {array.shape} (in Flax's layout), the model in config.json "
            f"expects {expected}."
        )
    return array


def _open(file: pathlib.Path):
    try:
        return safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{file} is truncated or not a safetensors file ({error}); download or copy it again."
        ) from error


def _load_safetensors(files: list[pathlib.Path], abstract: Mapping, dtype: np.dtype) -> dict:
    where = str(files[0] if len(files) == 1 else files[0].parent)
    handles = [_open(file) for file in files]
    holder = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118
    file_of = {id(handle): file for handle, file in zip(handles, files, strict=True)}
    flat = flax.traverse_util.flatten_dict(abstract)
    found = {path: next((n for n in torch_names(path) if n in holder), None) for path in flat}
    extra = {n for n in holder if not _IGNORED.match(n)} - set(found.values())
    _check_keys(
        [torch_names(path)[0] for path, name in found.items() if name is None], extra, where
    )
    loaded = {}
    for path, name in found.items():
        tensor = _to_flax(holder[name].get_tensor(name), path[-1], len(flat[path].shape))
        _checked(tensor, flat[path].shape, name, str(file_of[id(holder[name])]))
        loaded[path] = tensor.astype(dtype, order="C", copy=False)
    return flax.traverse_util.unflatten_dict(loaded)


def _load_msgpack(file: pathlib.Path, abstract: Mapping, dtype: np.dtype) -> dict:
    try:
        tree = flax.serialization.msgpack_restore(file.read_bytes())
        stored = flax.traverse_util.flatten_dict(tree, sep="/")
    except Exception as error:  # msgpack raises a different exception for each way to be damaged
        raise UserError(
            f"{file} is truncated or not a Flax msgpack file ({error}); download or copy it again."
        ) from error
    flat = flax.traverse_util.flatten_dict(abstract, sep="/")
    extra = {n for n in stored if not _IGNORED.match(n)} - flat.keys()
    _check_keys(flat.keys() - stored.keys(), extra, str(file))
    loaded = {
        name: _checked(stored.pop(name), leaf.shape, name, str(file)).astype(dtype)
        for name, leaf in flat.items()
    }
    return flax.traverse_util.unflatten_dict(loaded, sep="/")


def load_weights(files: list[pathlib.Path], abstract: Mapping, dtype: np.dtype) -> dict:
    """Reads a Flax parameter tree.

    Args:
      files: one .msgpack, or one or more .safetensors that together hold the state dict.
      abstract: the model's tree of `ShapeDtypeStruct`s.
      dtype: what every parameter is cast to.

    Returns:
      A tree like `abstract`, of numpy arrays in `dtype`.

    Raises:
      UserError: for missing parameters (listed, with the extra ones), a wrong shape, or a damaged
        file, naming the file. Extra parameters alone only warn.
    """
    if files[0].suffix == ".msgpack":
        return _load_msgpack(files[0], abstract, dtype)
    return _load_safetensors(files, abstract, dtype)


def save_weights(params: Mapping, path: str | pathlib.Path, dtype: str = "float32") -> None:
    """Writes a Flax tree as one .safetensors file with PyTorch's names and layouts.

    diffusers (UNet, VAE) and transformers (CLIP) read it as `diffusion_pytorch_model.safetensors`
    and `model.safetensors`; so does `load_backbone`.

    Args:
      params: the parameter tree of a UNet, a VAE, a CLIP or its text tower; numpy or JAX arrays.
      path: the file to write.
      dtype: "float32", "float16" or "bfloat16".
    """
    tensors = {
        torch_names(key)[0]: np.array(_to_torch(np.asarray(value), key[-1]), dtype, order="C")
        for key, value in flax.traverse_util.flatten_dict(params).items()
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def read_index(file: pathlib.Path) -> list[str]:
    """The shards that a *.safetensors.index.json names, sorted."""
    try:
        return sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise UserError(f"{file} is not an index of safetensors shards ({error!r}).") from error
