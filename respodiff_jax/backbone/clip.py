"""CLIP, which maps pictures and texts to unit vectors of one space."""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from respodiff_jax.backbone.files import find_clip, read_json, sha256
from respodiff_jax.backbone.text import equal_batches, read_tokenizer, tokenise
from respodiff_jax.backbone.weights import load_weights, save_weights
from respodiff_jax.errors import UserError
from respodiff_jax.progress import Progress

_IMAGES_PER_DEVICE, _TEXTS = 64, 256  # encoded at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP, an unbound Flax module with float32 parameters, and its preprocessing.

    `identity` has `name`, `revision` (the commit of a hub model, else None) and `sha256` of the
    weight files.
    """

    identity: Mapping[str, Any]
    module: nn.Module
    params: Mapping[str, Any]
    tokenizer: transformers.CLIPTokenizer
    processor: transformers.CLIPImageProcessor

    @functools.cached_property
    def _encode_images(self):
        return jax.jit(functools.partial(encode_images, self.module))

    @functools.cached_property
    def _encode_texts(self):
        return jax.jit(functools.partial(encode_texts, self.module))

    def image_features(self, images: Sequence[Any], progress: bool = False) -> np.ndarray:
        """The unit vectors of pictures, computed on all local devices.

        Args:
          images: N pictures of any sizes, uint8 (height, width, 3) arrays or PIL images. They are
            resized, cropped and normalised as in CLIP's training.
          progress: show a progress bar.

        Returns:
          float32 (N, D).
        """
        mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
        by_sample = NamedSharding(mesh, PartitionSpec("data"))
        params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        features = []
        step = min(_IMAGES_PER_DEVICE, -(-len(images) // mesh.size)) * mesh.size
        for start in Progress(range(0, len(images), step), "clip", disable=not progress):
            part = [np.asarray(image) for image in images[start : start + step]]
            pixels = np.stack(
                self.processor(part, input_data_format="channels_last")["pixel_values"]
            ).transpose(0, 2, 3, 1)
            padded = np.concatenate([pixels, np.zeros((step - len(part), *pixels.shape[1:]))])
            pixels = jax.device_put(padded.astype(np.float32), by_sample)
            features.append(np.asarray(self._encode_images(params, pixels))[: len(part)])
        return np.concatenate(features)

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """The unit vectors of N texts, float32 (N, D).

        A text that is too long is cut, with a warning.
        """
        length = self.module.config.text_config.max_position_embeddings
        ids = tokenise(self.tokenizer, texts, length)
        features = []
        for rows, count in equal_batches(len(ids), _TEXTS):
            features.append(np.asarray(self._encode_texts(self.params, ids[rows]))[:count])
        return np.concatenate(features)


# transformers logs this for every model; setup.py bounds the version instead.
logging.getLogger("transformers.modeling_flax_utils").addFilter(
    lambda record: not record.getMessage().startswith("TensorFlow and JAX classes are deprecated")
)


def build_clip(config: transformers.CLIPConfig) -> nn.Module:
    """The unbound Flax module of a CLIP, float32."""
    return transformers.FlaxCLIPModel(config, _do_init=False).module


def init_clip(config: transformers.CLIPConfig, key: jax.Array) -> dict:
    """New random parameters, as transformers draws them."""
    model = transformers.FlaxCLIPModel(config, _do_init=False)
    return model.init_weights(key, model.input_shape)


def encode_images(module: nn.Module, params: Mapping, pixels: jax.Array) -> jax.Array:
    """Preprocessed pictures, float32 (B, height, width, 3), to unit vectors, float32 (B, D)."""

    def project(clip, pixels):
        return clip.visual_projection(clip.vision_model(pixel_values=pixels)[1])

    return _unit(module.apply({"params": params}, pixels, method=project))


def encode_texts(module: nn.Module, params: Mapping, ids: jax.Array) -> jax.Array:
    """Token ids, int32 (B, L), to unit vectors, float32 (B, D).

    There is no padding mask: the feature is that of the end token, which does not attend to the
    padding after it.
    """

    def project(clip, ids):
        return clip.text_projection(_text(clip, ids)[1])

    return _unit(module.apply({"params": params}, ids, method=project))


def encode_contexts(module: nn.Module, params: Mapping, ids: jax.Array) -> jax.Array:
    """Token ids, int32 (B, L), to last hidden states, float32 (B, L, D), the UNet's context."""
    return module.apply({"params": params}, ids, method=lambda clip, ids: _text(clip, ids)[0])


def _text(clip, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    return clip.text_model(ids, jnp.ones_like(ids), positions)


def _unit(vectors):
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def load_clip(name_or_path: str | pathlib.Path) -> Clip:
    """Loads a CLIP, without torch.

    Args:
      name_or_path: a folder in transformers' layout (config, preprocessor, tokenizer, and
        safetensors or Flax weights), or a hub id such as "openai/clip-vit-base-patch32".

    Returns:
      The `Clip`, with its parameters as numpy arrays.

    Raises:
      UserError: if there is no such model, files are missing (names all of them) or damaged, the
        model is not a CLIP, or the weights do not fit the config.
    """
    folder, commit, weights = find_clip(str(name_or_path))
    content = read_json(folder / "config.json")
    if content.get("model_type") != "clip":
        raise UserError(
            f"{name_or_path}: config.json: model_type is {content.get('model_type')!r}, expected"
            " 'clip'; use for example openai/clip-vit-base-patch32"
        )
    config = transformers.CLIPConfig.from_dict(content)
    abstract = jax.eval_shape(functools.partial(init_clip, config), jax.random.key(0))
    return Clip(
        identity={"name": str(name_or_path), "revision": commit, "sha256": sha256(*weights)},
        module=build_clip(config),
        params=load_weights(weights, abstract, np.dtype("float32")),
        tokenizer=read_tokenizer(folder),
        processor=transformers.CLIPImageProcessor.from_pretrained(folder),
    )


def save_clip(
    folder: str | pathlib.Path,
    config: transformers.CLIPConfig,
    params: Mapping,
    tokenizer: transformers.CLIPTokenizer,
    processor: transformers.CLIPImageProcessor,
) -> None:
    """Writes a folder that `load_clip` and PyTorch's `CLIPModel` and `CLIPProcessor` read.

    The folder is created if it does not exist, existing files are overwritten. The weights are
    float16.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(params, folder / "model.safetensors", "float16")
    content = config.to_dict() | {"architectures": ["CLIPModel"]}
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
