"""`Backbone`, the frozen diffusion model that the rest of the package works with."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from respodiff_jax.backbone import text
from respodiff_jax.backbone import unet as unet_lib
from respodiff_jax.backbone.flax_models import (
    LAYER,
    match_pytorch,
    name_layers,
    upsample_in_phases,
    with_attention,
)
from respodiff_jax.backbone.unet import Conditioning, Skips
from respodiff_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen text-to-image model: its modules, tokenizers and parameters.

    Every method that runs inside a compiled step takes the parameters as its first argument.
    `params` holds the loaded ones on the host; the caller places them on devices.

    Shapes are channels last: (B, h, w, c) for latents, (B, H, W, C) for the mid-block output, and
    (B, height, width, 3) for images. n counts prompts, L tokens, D the features of a token and E
    those of the pooled prompt.

    Attributes:
      identity: `{"name", "revision", "variant", "unet_sha256"}`, which an adapter records as its
        base model. The hash covers the UNet's weight files, so the fp16 and fp32 files of one model
        have different hashes.
      unet: the unbound `FlaxUNet2DConditionModel`.
      vae: the unbound `FlaxAutoencoderKL`.
      text_encoders: the unbound CLIP text encoders, one for SD 1.x and 2.x, two for SDXL.
      tokenizers: the `CLIPTokenizer` of each text encoder.
      scheduler_config: the contents of scheduler/scheduler_config.json.
      params: `{"unet", "vae", "text_encoder"[, "text_encoder_2"]}`, parameter trees in `dtype`.
      dtype: float32 or bfloat16, of parameters and computation.
      zeros_for_empty_prompt: SDXL's `force_zeros_for_empty_prompt`; see `encode_prompts`.
      attention: the implementation in UNet and VAE, "plain", "chunked", "flash", "cudnn" or
        "stock"; see `attention.attention`.
      load: for a model opened with `abstract=True`, reads its weights; else None.
    """

    identity: Mapping[str, str | None]
    unet: nn.Module = dataclasses.field(repr=False)
    vae: nn.Module = dataclasses.field(repr=False)
    text_encoders: tuple[nn.Module, ...] = dataclasses.field(repr=False)
    tokenizers: tuple[Any, ...] = dataclasses.field(repr=False)
    scheduler_config: Mapping[str, Any] = dataclasses.field(repr=False)
    params: Mapping[str, Any] = dataclasses.field(repr=False)
    dtype: np.dtype
    zeros_for_empty_prompt: bool = False
    attention: str = "plain"
    load: Callable[[], "Backbone"] | None = dataclasses.field(default=None, repr=False)

    def loaded(self) -> "Backbone":
        """This model with its weights: itself, unless it was opened with `abstract=True`.

        Raises:
          UserError: as `load_backbone`.
        """
        return self if self.load is None else self.load()

    @property
    def vae_factor(self) -> int:
        """Pixels per latent position along each axis."""
        return 2 ** (len(self.vae.block_out_channels) - 1)

    @property
    def default_resolution(self) -> int:
        """The side, in pixels, of the square images that the model was trained on."""
        return self.unet.sample_size * self.vae_factor

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts; "epsilon" where the scheduler's config does not say."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    def trained_at(self, resolution: int) -> dict[str, Any]:
        """The `backbone` entry of an adapter trained on this model, at a resolution in pixels."""
        own = {"resolution": resolution, "prediction_type": self.prediction_type}
        return {**self.identity, **own}

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """The shape of a latent, (h, w, c); `resolution` is the images' side in pixels.

        Raises:
          UserError: if the UNet cannot halve such latents evenly; names the nearest valid
            resolutions.
        """
        multiple = self.vae_factor * self._unet_factor
        if resolution < multiple or resolution % multiple:
            below = max(resolution // multiple, 1) * multiple
            nearest = f"{below} or {below + multiple}" if resolution > multiple else f"{multiple}"
            raise UserError(
                f"`resolution` is {resolution}, this model needs a positive multiple of {multiple} "
                f"pixels; the nearest is {nearest} (trained at {self.default_resolution})"
            )
        side = resolution // self.vae_factor
        return side, side, self.unet.in_channels

    def mid_block_shape(self, resolution: int) -> tuple[int, int, int]:
        """The shape of h, the mid-block output, (H, W, C).

        Raises:
          UserError: as `latent_shape`.
        """
        side = self.latent_shape(resolution)[0] // self._unet_factor
        return side, side, self.unet.block_out_channels[-1]

    @property
    def _unet_factor(self) -> int:
        return 2 ** (len(self.unet.block_out_channels) - 1)

    def encode(
        self, params: Mapping, z_t: jax.Array, timesteps: jax.Array, cond: Conditioning
    ) -> tuple[jax.Array, Skips]:
        """The paper's e: the mid-block output h = e(z_t, t, y).

        Args:
          params: as `self.params`; only "unet" is read.
          z_t: float32 (B, h, w, c) noisy latents.
          timesteps: int32 (B,), from 0 to below the number of training timesteps.
          cond: the prompts' conditioning. Its leading axis is kB for k prompts a latent: first one
            for each latent, then another one for each.

        Returns:
          h: `dtype` (kB, H, W, C).
          skips: the `Skips` that `decode` needs.

        Raises:
          UserError: if an argument has the wrong shape.
        """
        return self._apply("unet", params, unet_lib.encode, z_t, timesteps, cond)

    def decode(self, params: Mapping, h: jax.Array, skips: Skips, remat: bool = False) -> jax.Array:
        """The paper's g: the UNet's output g(h, ...), eps or v as in `prediction_type`.

        Args:
          params: as `self.params`; only "unet" is read.
          h: float32 or bfloat16 (B, H, W, C) mid-block output, with the deltas added to it.
          skips: from `encode`.
          remat: save memory in the gradient: keep each layer's output, compute the rest again.

        Returns:
          float32 (B, h, w, c).
        """

        apply = functools.partial(self._apply, "unet")
        if remat:
            apply = functools.partial(apply, intercept=name_layers)
            policy = jax.checkpoint_policies.save_only_these_names(LAYER)
            apply = jax.checkpoint(apply, policy=policy, static_argnums=1)
        return apply({"unet": params["unet"]}, unet_lib.decode, h, skips)

    def _apply(
        self, part: str, params: Mapping, method: Callable, *args: Any, intercept: Any = None
    ) -> Any:
        """Runs a method of "unet" or "vae": computes as PyTorch does, with fast layers."""
        variables = {"params": params[part]}
        return _apply(getattr(self, part), method, self.attention, intercept, variables, *args)

    def tokenise(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of n prompts for each text encoder, int32 (n, L).

        Warns if a prompt is too long and is cut. It needs no weights, so a model opened with
        `abstract=True` can give the warning early.
        """
        ids = []
        for tokenizer, module in zip(self.tokenizers, self.text_encoders, strict=True):
            length = min(tokenizer.model_max_length, module.config.max_position_embeddings)
            ids.append(text.tokenise(tokenizer, prompts, length))
        return ids

    def encode_prompts(
        self, prompts: Sequence[str], resolution: int, params: Mapping | None = None
    ) -> Conditioning:
        """The conditioning of prompts, as the diffusers pipeline of this model computes it.

        With SDXL's `force_zeros_for_empty_prompt` the empty prompt gives zeros for context and
        pooled, as diffusers does where there is no negative prompt.

        Args:
          prompts: n >= 1 strings. A prompt over the tokenizer's limit is cut, with a warning.
          resolution: the side of the images in pixels; SDXL conditions on it.
          params: as `self.params`, the default; only the text encoders' are read.

        Returns:
          The conditioning: context `dtype` (n, L, D) and, for SDXL, pooled `dtype` (n, E) and
          time_ids float32 (n, 6).

        Raises:
          UserError: if `prompts` is not a non-empty sequence of strings, or the model does not
            have this resolution.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise UserError(f"`prompts` is {prompts!r}, expected a non-empty sequence of strings")
        self.latent_shape(resolution)
        params = self.params if params is None else params
        ids = self.tokenise(prompts)
        keep = np.array([p != "" or not self.zeros_for_empty_prompt for p in prompts])
        return self._conditioning(*self._encode_tokens(_encoders(params), ids, keep), resolution)

    def encode_vectors(
        self,
        params: Mapping,
        ids: Sequence[jax.Array],
        vectors: Sequence[jax.Array],
        resolution: int,
    ) -> Conditioning:
        """The conditioning of prompts whose tokens have the given embeddings; differentiable.

        Args:
          params: as `self.params`; only the text encoders' are read.
          ids: int32 (n, L) for each text encoder. They say where a prompt ends.
          vectors: (n, L, D) for each text encoder, in place of the rows of `token_tables`.
          resolution: the side of the images in pixels.
        """
        keep = jnp.ones(len(ids[0]), bool)
        encoded = text.encode_tokens(self.text_encoders, _encoders(params), ids, keep, vectors)
        return self._conditioning(*encoded, resolution)

    def token_tables(self, params: Mapping) -> list[jax.Array]:
        """The embeddings of the vocabulary, (V, D) for each text encoder."""
        embeddings = (own["text_model"]["embeddings"] for own in _encoders(params))
        return [own["token_embedding"]["embedding"] for own in embeddings]

    def _conditioning(self, context, pooled, resolution):
        if pooled is None:
            return Conditioning(context)
        size = (resolution, resolution)
        time_ids = np.array([[*size, 0, 0, *size]] * len(context), np.float32)
        return Conditioning(context, pooled, jnp.asarray(time_ids))

    def decode_latents(self, params: Mapping, z: jax.Array) -> jax.Array:
        """The images, float32 (B, height, width, 3) in [0, 1], of latents as the UNet sees them.

        The latents are float32 (B, h, w, c). Of the parameters only "vae" is read.
        """

        images = self._apply("vae", params, _decode_images, z / self.vae.config.scaling_factor)
        return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)

    @functools.cached_property
    def programs(self) -> dict[Any, Callable]:
        """A cache for the jitted programs of this model; the caller chooses the keys."""
        return {}

    @functools.cached_property
    def _encode_tokens(self) -> Callable:
        return jax.jit(functools.partial(text.encode_tokens, self.text_encoders))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _apply(module, method, attention, intercept, variables, *args):
    """Jitted, so that all programs of a process share one trace of a module at equal shapes."""
    with contextlib.ExitStack() as stack:
        for one in (match_pytorch, upsample_in_phases, with_attention(attention), intercept):
            if one is not None:
                stack.enter_context(nn.intercept_methods(one))
        return module.apply(variables, *args, method=method)


def _decode_images(vae: nn.Module, z: jax.Array) -> jax.Array:
    return vae.decoder(vae.post_quant_conv(z))


def _encoders(params: Mapping) -> list[Mapping]:
    """The parameters of each text encoder."""
    return [own for name, own in sorted(params.items()) if name.startswith("text_encoder")]
