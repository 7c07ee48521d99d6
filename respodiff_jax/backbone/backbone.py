"""`Backbone`: what the rest of the package sees of a frozen diffusion model."""

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
from respodiff_jax.backbone.flax_models import by_repeating, with_attention
from respodiff_jax.backbone.unet import Conditioning, Skips
from respodiff_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen text-to-image model: modules, tokenizers and parameters, with images and latents
    NHWC.

    Parameters are an explicit argument of every function that runs inside a compiled step; `params`
    holds the loaded ones, on the host, for the caller to place.

    Attributes:
      identity: `{"name", "revision", "variant", "unet_sha256"}`, what an adapter records of its
        base model. The hash is that of the UNet's weight files, so two variants (fp16, fp32) of one
        model differ in it.
      unet: the unbound `FlaxUNet2DConditionModel`.
      vae: the unbound `FlaxAutoencoderKL`.
      text_encoders: the unbound CLIP text towers, two for SDXL.
      tokenizers: their `CLIPTokenizer`s.
      scheduler_config: the contents of scheduler/scheduler_config.json.
      params: `{"unet", "vae", "text_encoder"[, "text_encoder_2"]}`, parameter trees in `dtype`.
      dtype: float32 or bfloat16, of parameters and computation.
      zeros_for_empty_prompt: SDXL's `force_zeros_for_empty_prompt`; see `encode_prompts`.
      attention: implementation in UNet and VAE, "plain", "flash", "cudnn" or "stock"; see
        `flax_models.with_attention`.
      load: of a model opened with `abstract=True`: reads the weights of the same files.
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
        """This model with its weights: itself, unless it was opened with `abstract=True`."""
        return self if self.load is None else self.load()

    @property
    def vae_factor(self) -> int:
        """Pixels per latent position along each axis."""
        return 2 ** (len(self.vae.block_out_channels) - 1)

    @property
    def default_resolution(self) -> int:
        """The square resolution in pixels that the model was trained for."""
        return self.unet.sample_size * self.vae_factor

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts; "epsilon" where the scheduler's config does not say."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    def trained_at(self, resolution: int) -> dict[str, Any]:
        """What an adapter trained on this model at a resolution, in pixels, says of it."""
        return {
            **self.identity,
            "resolution": resolution,
            "prediction_type": self.prediction_type,
        }

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(h, w, c) of a latent for square images of `resolution` pixels.

        Raises:
          UserError: if the UNet cannot halve such latents evenly; names the nearest valid
            resolutions.
        """
        multiple = self.vae_factor * self._unet_factor
        if resolution < multiple or resolution % multiple:
            below = max(resolution // multiple, 1) * multiple
            nearest = f"{below} or {below + multiple}" if resolution > multiple else f"{multiple}"
            raise UserError(
                f"resolution={resolution}: this model needs a positive multiple of {multiple} "
                f"pixels; the nearest valid is {nearest} (trained at {self.default_resolution})."
            )
        side = resolution // self.vae_factor
        return side, side, self.unet.in_channels

    def mid_block_shape(self, resolution: int) -> tuple[int, int, int]:
        """(H, W, C) of h, the mid-block output, for square images of `resolution` pixels."""
        side = self.latent_shape(resolution)[0] // self._unet_factor
        return side, side, self.unet.block_out_channels[-1]

    @property
    def _unet_factor(self) -> int:
        return 2 ** (len(self.unet.block_out_channels) - 1)

    def encode(
        self, params: Mapping, z_t: jax.Array, timesteps: jax.Array, cond: Conditioning
    ) -> tuple[jax.Array, Skips]:
        """h = e(z_t, t, y) and what g needs beside it; see `unet.encode`."""
        return unet_lib.encode(self.unet, params["unet"], z_t, timesteps, cond, self.attention)

    def decode(self, params: Mapping, h: jax.Array, skips: Skips, remat: bool = False) -> jax.Array:
        """The model output g(h, ...), (B, h, w, c) fp32; see `unet.decode`."""
        return unet_lib.decode(self.unet, params["unet"], h, skips, self.attention, remat)

    def tokenise(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Each text encoder's token ids, int32 (n, L); warns of prompts that are cut.

        Needs no weights: called on an abstract backbone it shows in time what will be cut.
        """
        ids = []
        for tokenizer, module in zip(self.tokenizers, self.text_encoders, strict=True):
            length = min(tokenizer.model_max_length, module.config.max_position_embeddings)
            ids.append(text.tokenise(tokenizer, prompts, length))
        return ids

    def encode_prompts(
        self, prompts: Sequence[str], resolution: int, params: Mapping | None = None
    ) -> Conditioning:
        """The prompts' conditioning, as the diffusers pipeline of this model computes it.

        For an SDXL model with `force_zeros_for_empty_prompt` the empty prompt gives zeros for
        context and pooled: it means "no negative prompt", for which diffusers uses zeros too.

        Args:
          prompts: n >= 1 strings; text beyond the tokenizer's limit is cut with a warning.
          resolution: of the images to come, in pixels; SDXL is told of it.
          params: as `self.params`, which are the default.

        Returns:
          `Conditioning` with leading axis n, in `dtype` (`time_ids` fp32).

        Raises:
          UserError: if prompts is not a non-empty sequence of strings, or the resolution does not
            fit.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise UserError(f"prompts must be a non-empty sequence of strings, got {prompts!r}.")
        self.latent_shape(resolution)
        params = self.params if params is None else params
        ids = self.tokenise(prompts)
        keep = np.array([p != "" or not self.zeros_for_empty_prompt for p in prompts])
        towers = [p for name, p in sorted(params.items()) if name.startswith("text_encoder")]
        context, pooled = self._encode_tokens(towers, ids, keep)
        if pooled is None:
            return Conditioning(context)
        size = (resolution, resolution)
        time_ids = np.array([[*size, 0, 0, *size]] * len(prompts), np.float32)
        return Conditioning(context, pooled, jnp.asarray(time_ids))

    @functools.cached_property
    def programs(self) -> dict[Any, Callable]:
        """Jitted programs that users of this model share, by what tells them apart."""
        return {}

    @functools.cached_property
    def _encode_tokens(self) -> Callable:
        return jax.jit(functools.partial(text.encode_tokens, self.text_encoders))

    def decode_latents(self, params: Mapping, z: jax.Array) -> jax.Array:
        """Images (B, H, W, 3), fp32 in [0, 1], of latents z (B, h, w, c)."""

        def decoder(vae, z):
            return vae.decoder(vae.post_quant_conv(z))

        z = z / self.vae.config.scaling_factor
        with (
            nn.intercept_methods(by_repeating),
            nn.intercept_methods(with_attention(self.attention)),
        ):
            images = self.vae.apply({"params": params["vae"]}, z, method=decoder)
        return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)
