"""The paper's e and g: the frozen UNet cut at its mid-block output.

`h, skips = encode(...)` is h = e(z_t, t, y); `decode(..., h + delta, skips)` is g(h + delta, ...).
Both call the submodules of diffusers' own UNet, so `decode(encode(...))` equals the stock model
(with `flax_models.as_trained`) to the last bit. Encode once and decode many times: the decoder
needs nothing but h and the skips.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from respodiff_jax.backbone.flax_models import (
    LAYER,
    as_trained,
    by_repeating,
    name_layers,
    with_attention,
)
from respodiff_jax.errors import UserError


class Conditioning(NamedTuple):
    """All that the UNet knows of a prompt; a pytree, so prompts stack, slice and shard like arrays.

    Attributes:
      context: (..., L, D) text encoder hidden states; SDXL: of both encoders, concatenated.
      pooled: (..., P) SDXL: the second text encoder's projected embedding; else None.
      time_ids: (..., 6) fp32, SDXL: original size, crop corner, target size; else None.
    """

    context: jax.Array
    pooled: jax.Array | None = None
    time_ids: jax.Array | None = None


class Skips(NamedTuple):
    """What the decoder needs beside h; a pytree whose arrays all lead with the batch axis."""

    residuals: tuple[jax.Array, ...]  # outputs of conv_in and of every down layer, (B, ., ., .)
    temb: jax.Array  # (B, 4 * block_out_channels[0]) time (and SDXL size and text) embedding
    context: jax.Array  # (B, L, D) text encoder hidden states


def _takes_context(block: nn.Module) -> bool:
    return hasattr(block, "attentions")


def _encode(unet, z_t, timesteps, cond):
    temb = unet.time_embedding(unet.time_proj(timesteps.astype(jnp.float32)))
    if unet.addition_embed_type == "text_time":
        time_embeds = unet.add_time_proj(cond.time_ids.astype(jnp.float32).ravel())
        time_embeds = time_embeds.reshape(z_t.shape[0], -1)
        temb += unet.add_embedding(jnp.concatenate([cond.pooled, time_embeds], axis=-1))

    x = unet.conv_in(z_t)
    residuals = (x,)
    for block in unet.down_blocks:
        x, outputs = block(x, temb, cond.context) if _takes_context(block) else block(x, temb)
        residuals += outputs
    h = unet.mid_block(x, temb, cond.context)
    return h, Skips(residuals, temb, cond.context)


def _decode(unet, h, skips):
    x, residuals = h.astype(unet.dtype), skips.residuals
    for block in unet.up_blocks:
        used = unet.layers_per_block + 1
        residuals, taken = residuals[:-used], residuals[-used:]
        context = (skips.context,) if _takes_context(block) else ()
        x = block(x, taken, skips.temb, *context)
    return unet.conv_out(nn.silu(unet.conv_norm_out(x))).astype(jnp.float32)


def _check_inputs(unet, z_t, timesteps, cond):
    if z_t.ndim != 4 or z_t.shape[-1] != unet.in_channels:
        raise UserError(
            f"z_t must be (B, h, w, {unet.in_channels}), channels last; got {z_t.shape}."
        )
    batch = z_t.shape[0]
    expected = {
        "timesteps": (timesteps, (batch,)),
        "cond.context": (cond.context, (batch, None, None)),
    }
    if unet.addition_embed_type == "text_time":
        if cond.pooled is None or cond.time_ids is None:
            raise UserError(
                "SDXL needs cond.pooled and cond.time_ids; see Backbone.encode_prompts."
            )
        expected |= {
            "cond.pooled": (cond.pooled, (batch, None)),
            "cond.time_ids": (cond.time_ids, (batch, 6)),
        }
    for name, (value, shape) in expected.items():
        if value.ndim != len(shape) or any(
            e not in (None, g) for e, g in zip(shape, value.shape, strict=True)
        ):
            wanted = ", ".join("." if e is None else str(e) for e in shape)
            raise UserError(f"{name} must be ({wanted}) for {batch} latents, got {value.shape}.")


def encode(
    unet: nn.Module,
    params: dict,
    z_t: jax.Array,
    timesteps: jax.Array,
    cond: Conditioning,
    attention: str = "plain",
) -> tuple[jax.Array, Skips]:
    """The paper's e: h = e(z_t, t, y), the mid-block output.

    Args:
      unet: a `FlaxUNet2DConditionModel`.
      params: its parameters.
      z_t: (B, h, w, c) latents, any float dtype; computed in `unet.dtype`.
      timesteps: (B,) integers in [0, number of training timesteps).
      cond: the prompts' `Conditioning`, leading axis B.
      attention: implementation, see `attention.attention`.

    Returns:
      h (B, H, W, C) in `unet.dtype`, and the `Skips` that `decode` needs.

    Raises:
      UserError: if an argument's shape does not fit, naming it.
    """
    _check_inputs(unet, z_t, timesteps, cond)
    with nn.intercept_methods(as_trained), nn.intercept_methods(with_attention(attention)):
        return unet.apply({"params": params}, z_t, timesteps, cond, method=_encode)


def decode(
    unet: nn.Module,
    params: dict,
    h: jax.Array,
    skips: Skips,
    attention: str = "plain",
    remat: bool = False,
) -> jax.Array:
    """The paper's g: the model's output (eps, or v for a v-prediction model) from h and the skips.

    Args:
      unet: a `FlaxUNet2DConditionModel`.
      params: its parameters; the encoder's are not used.
      h: (B, H, W, C) mid-block output with whatever was added to it; cast to `unet.dtype`.
      skips: from `encode`.
      attention: as of `encode`.
      remat: keep only each layer's output for the gradient, and compute the rest again.

    Returns:
      (B, h, w, c) fp32.
    """

    def apply(params, h, skips):
        with (
            nn.intercept_methods(name_layers),
            nn.intercept_methods(as_trained),
            nn.intercept_methods(by_repeating),
            nn.intercept_methods(with_attention(attention)),
        ):
            return unet.apply({"params": params}, h, skips, method=_decode)

    if remat:
        policy = jax.checkpoint_policies.save_only_these_names(LAYER)
        apply = jax.checkpoint(apply, policy=policy)
    return apply(params, h, skips)
