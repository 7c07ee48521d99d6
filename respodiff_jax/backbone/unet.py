"""The paper's e and g: the frozen UNet, cut at the mid-block output h.

`encode` computes h = e(z_t, t, y), and `decode` computes g(h, ...) from h and the skips. A latent
can be encoded once and decoded many times, with different deltas added to h.

Both run inside `apply` of diffusers' Flax UNet and call its submodules, so `decode(encode(...))`
equals the whole UNet (with the interceptors of `flax_models`) to the last bit. `Backbone.encode`
and `Backbone.decode` explain arguments and shapes.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from respodiff_jax.errors import UserError


class Conditioning(NamedTuple):
    """What the UNet gets of a prompt; a pytree, so prompts stack, slice and shard like arrays.

    Attributes:
      context: (..., L, D) hidden states of the text encoder; for SDXL, of both, concatenated.
      pooled: (..., E) for SDXL, the second text encoder's projected embedding; else None.
      time_ids: float32 (..., 6) for SDXL, original size, crop corner and target size; else None.
    """

    context: jax.Array
    pooled: jax.Array | None = None
    time_ids: jax.Array | None = None


class Skips(NamedTuple):
    """What `decode` needs besides h; a pytree whose arrays all have h's leading axis.

    Attributes:
      residuals: (B, ., ., .) outputs of conv_in and of every down layer.
      temb: (B, 4 * block_out_channels[0]) embedding of the timestep and, for SDXL, of the image
        size and the pooled prompt.
      context: (B, L, D) hidden states of the text encoder.
    """

    residuals: tuple[jax.Array, ...]
    temb: jax.Array
    context: jax.Array


def _takes_context(block: nn.Module) -> bool:
    return hasattr(block, "attentions")


def encode(
    unet: nn.Module, z_t: jax.Array, timesteps: jax.Array, cond: Conditioning
) -> tuple[jax.Array, Skips]:
    """The paper's e: the mid-block output and the skips.

    Blocks before the first one that depends on the prompts are evaluated once for each latent.
    """
    _check_inputs(unet, z_t, timesteps, cond)
    samples, copies = len(cond.context), len(cond.context) // len(z_t)

    def for_each_prompt(tree):
        return jax.tree.map(
            lambda x: x if len(x) == samples else jnp.concatenate([x] * copies), tree
        )

    # SDXL's `temb` depends on the prompts. Sharing `conv_in` alone would save little.
    if unet.addition_embed_type == "text_time" or _takes_context(unet.down_blocks[0]):
        z_t, timesteps = for_each_prompt((z_t, timesteps))
    temb = unet.time_embedding(unet.time_proj(timesteps.astype(jnp.float32)))
    if unet.addition_embed_type == "text_time":
        time_embeds = unet.add_time_proj(cond.time_ids.astype(jnp.float32).ravel())
        time_embeds = time_embeds.reshape(z_t.shape[0], -1)
        temb += unet.add_embedding(jnp.concatenate([cond.pooled, time_embeds], axis=-1))

    x = unet.conv_in(z_t)
    residuals = (x,)
    for block in unet.down_blocks:
        if _takes_context(block):
            x, temb, residuals = for_each_prompt((x, temb, residuals))
            x, outputs = block(x, temb, cond.context)
        else:
            x, outputs = block(x, temb)
        residuals += outputs
    x, temb, residuals = for_each_prompt((x, temb, residuals))
    h = unet.mid_block(x, temb, cond.context)
    return h, Skips(residuals, temb, cond.context)


def decode(unet: nn.Module, h: jax.Array, skips: Skips) -> jax.Array:
    """The paper's g: the UNet's output, from a mid-block output with the deltas added to it."""
    x, residuals = h.astype(unet.dtype), skips.residuals
    for block in unet.up_blocks:
        used = unet.layers_per_block + 1
        residuals, taken = residuals[:-used], residuals[-used:]
        context = (skips.context,) if _takes_context(block) else ()
        x = block(x, taken, skips.temb, *context)
    return unet.conv_out(nn.silu(unet.conv_norm_out(x))).astype(jnp.float32)


def _check_inputs(unet, z_t, timesteps, cond):
    if z_t.ndim != 4 or z_t.shape[-1] != unet.in_channels or not len(z_t):
        raise UserError(
            f"`z_t` has shape {z_t.shape}, expected (B, h, w, {unet.in_channels}), channels last"
        )
    latents, prompts = len(z_t), len(cond.context)
    batch = prompts if prompts and prompts % latents == 0 else latents
    expected = {
        "timesteps": (timesteps, (latents,)),
        "cond.context": (cond.context, (batch, None, None)),
    }
    if unet.addition_embed_type == "text_time":
        if cond.pooled is None or cond.time_ids is None:
            raise UserError(
                "SDXL needs `cond.pooled` and `cond.time_ids`, which Backbone.encode_prompts gives"
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
            raise UserError(
                f"`{name}` has shape {value.shape}, expected ({wanted}) for {latents} latents and "
                f"{batch // latents} prompt(s) each"
            )
