"""The evaluator's files: a folder that PyTorch's `transformers.CLIPModel` reads; no torch here."""

import json
import pathlib

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy
import transformers

from respodiff_jax.backbone.weights import torch_names


def _name(path):
    """PyTorch's name of a parameter; `class_embedding` and `logit_scale` are no layer's."""
    return (
        ".".join(path) if path[-1] in ("class_embedding", "logit_scale") else torch_names(path)[0]
    )


def _transposed(array, leaf, *, to_torch):
    if leaf != "kernel":
        return array
    if array.ndim == 2:
        return array.T
    return array.transpose(3, 2, 0, 1) if to_torch else array.transpose(2, 3, 1, 0)


def save_clip(folder, config, params, dtype="float16"):
    """Writes a `transformers.CLIPConfig` and a Flax parameter tree as config and safetensors."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, value in flax.traverse_util.flatten_dict(params).items():
        array = _transposed(np.asarray(value, dtype), path[-1], to_torch=True)
        tensors[_name(path)] = np.array(array, order="C")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": False,
        "do_center_crop": False,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    content = config.to_dict() | {"architectures": ["CLIPModel"]}
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_clip(folder):
    """Reads such a folder; returns an uninitialised `FlaxCLIPModel` and its float32 parameters.

    Raises:
      ValueError: if tensors are missing, left over or of another shape.
    """
    folder = pathlib.Path(folder)
    model = transformers.FlaxCLIPModel(
        transformers.CLIPConfig.from_pretrained(folder), _do_init=False
    )
    abstract = jax.eval_shape(
        lambda key: model.init_weights(key, model.input_shape), jax.random.key(0)
    )
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    params = {}
    for path, leaf in flax.traverse_util.flatten_dict(abstract).items():
        if _name(path) not in tensors:
            raise ValueError(f"{folder}: lacks {_name(path)}; expected a CLIP of this config.json")
        array = _transposed(tensors.pop(_name(path)), path[-1], to_torch=False)
        if array.shape != leaf.shape:
            raise ValueError(
                f"{folder}: {_name(path)} has shape {array.shape}, expected {leaf.shape}"
            )
        params[path] = np.asarray(array, np.float32)
    if tensors:
        raise ValueError(
            f"{folder}: unexpected tensors {sorted(tensors)[:5]}; expected its config.json's CLIP"
        )
    return model, flax.traverse_util.unflatten_dict(params)
