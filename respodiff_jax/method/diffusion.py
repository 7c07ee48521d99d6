"""Sampling steps and classifier-free guidance of the frozen model (paper, section 3)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float32, Int, Real

from respodiff_jax.method.schedule import Schedule

Latent = Float32[ArrayLike, "B h w c"]
# One for all samples or, when they are at different steps, one for each.
DdimIndex = Int[ArrayLike, ""] | Int[ArrayLike, "B"]


def predict_eps(
    schedule: Schedule, model_output: Latent, z_t: Latent, ddim_index: DdimIndex
) -> Latent:
    """The noise `eps` that a model output predicts.

    The objectives are written in eps (paper, equations 4-6), also for v-prediction models, where
    `eps = sqrt(alpha_bar) * v + sqrt(1 - alpha_bar) * z_t`.
    """
    if schedule.prediction_type == "epsilon":
        return model_output
    alpha_bar = _per_sample(schedule.alpha_bars, ddim_index, z_t)
    return jnp.sqrt(alpha_bar) * model_output + jnp.sqrt(1 - alpha_bar) * z_t


def predict_z_0(
    schedule: Schedule, model_output: Latent, z_t: Latent, ddim_index: DdimIndex
) -> Latent:
    """The clean latents `z_0` that a model output predicts."""
    alpha_bar = _per_sample(schedule.alpha_bars, ddim_index, z_t)
    if schedule.prediction_type == "epsilon":
        return (z_t - jnp.sqrt(1 - alpha_bar) * model_output) / jnp.sqrt(alpha_bar)
    return jnp.sqrt(alpha_bar) * z_t - jnp.sqrt(1 - alpha_bar) * model_output


def ddim_step(
    schedule: Schedule,
    model_output: Latent,
    z_t: Latent,
    ddim_index: DdimIndex,
    to_index: DdimIndex | None = None,
) -> Latent:
    """One deterministic DDIM step (Song et al. 2021, eta = 0); returns the new latents.

    Args:
      schedule: the sampler.
      model_output: the UNet's (guided) prediction at `z_t`.
      z_t: latents at `schedule.alpha_bars[ddim_index]`.
      ddim_index: where the step begins.
      to_index: where the step leads; by default to the next noise level. (The last noise level has
        no index.)
    """
    if to_index is None:
        next_alpha_bar = _per_sample(schedule.next_alpha_bars, ddim_index, z_t)
    else:
        next_alpha_bar = _per_sample(schedule.alpha_bars, to_index, z_t)
    eps = predict_eps(schedule, model_output, z_t, ddim_index)
    z_0 = predict_z_0(schedule, model_output, z_t, ddim_index)
    return jnp.sqrt(next_alpha_bar) * z_0 + jnp.sqrt(1 - next_alpha_bar) * eps


def dpm_solver_step(
    schedule: Schedule, z_0: Latent, previous_z_0: Latent, z_t: Latent, ddim_index: DdimIndex
) -> Latent:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    The first step, and the last one if it leads to `alpha_bar` 1, are of first order.

    Args:
      schedule: the sampler.
      z_0: `predict_z_0` at `z_t`.
      previous_z_0: `predict_z_0` of the step before; any value at the first step.
      z_t: latents at `schedule.alpha_bars[ddim_index]`.
      ddim_index: where the step begins.
    """

    def log_snr(alpha_bar):
        return (jnp.log(alpha_bar) - jnp.log1p(-alpha_bar)) / 2

    index = jnp.asarray(ddim_index)
    before = _per_sample(schedule.alpha_bars, jnp.maximum(index - 1, 0), z_t)
    now = _per_sample(schedule.alpha_bars, index, z_t)
    after = _per_sample(schedule.next_alpha_bars, index, z_t)
    step = log_snr(after) - log_snr(now)
    is_first_order = (before == now) | (after == 1)
    ratio = jnp.where(is_first_order, 1, (log_snr(now) - log_snr(before)) / step)
    slope = jnp.where(is_first_order, 0, (z_0 - previous_z_0) / ratio)
    signal = jnp.sqrt(after) * -jnp.expm1(-step)
    return jnp.sqrt((1 - after) / (1 - now)) * z_t + signal * (z_0 + slope / 2)


def concatenate(*trees: Any) -> Any:
    """Batches `(B, ...)` as one batch `(n * B, ...)`, leaf by leaf."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *trees)


def split(tree: Any, count: int) -> tuple[Any, ...]:
    """The inverse of `concatenate`: `count` batches of equal size."""
    leaves, structure = jax.tree.flatten(tree)
    parts = (jnp.split(x, count) for x in leaves)
    return tuple(map(structure.unflatten, zip(*parts, strict=True)))


def cfg_combine(
    cond: Latent,
    uncond: Latent,
    guidance_scale: Float[ArrayLike, ""] | Float[ArrayLike, "B 1 1 1"],
) -> Latent:
    """Classifier-free guidance, `uncond + guidance_scale * (cond - uncond)`."""
    return uncond + guidance_scale * (cond - uncond)


def guided_output(
    encode: Callable,
    decode: Callable,
    params: Any,
    z_t: Latent,
    timesteps: Real[ArrayLike, "B"],
    cond: Any,
    uncond: Any,
    guidance_scale: Float[ArrayLike, ""],
    steer: Callable[[Float[Array, "B H W C"]], Float[Array, "B H W C"]],
) -> Latent:
    """The guided model output, steered on the conditional half only (paper, section 4.4).

    The UNet is evaluated in one pass, for both prompts of each latent.

    Args:
      encode: `e(params, z_t, timesteps, cond) -> (h, skips)`, with two prompts a latent.
      decode: `g(params, h, skips) -> output`.
      params: frozen parameters.
      z_t, timesteps: latents, and the timesteps that the UNet is asked for.
      cond, uncond: conditioning of the prompts and of the empty or negative prompts, leading
        axis B.
      guidance_scale: 1 means no guidance.
      steer: changes the conditional half's mid-block output.
    """
    h, skips = encode(params, z_t, timesteps, concatenate(cond, uncond))
    h_cond, h_uncond = split(h, 2)
    outputs = decode(params, concatenate(steer(h_cond), h_uncond), skips)
    return cfg_combine(*split(outputs, 2), guidance_scale)


def _per_sample(
    values: Float32[Array | np.ndarray, "S"], ddim_index: DdimIndex, z: Latent
) -> Float32[Array, "#B 1 1 1"]:
    """`values[ddim_index]`, shaped to multiply `z`."""
    picked = jnp.asarray(values)[jnp.asarray(ddim_index)]
    return picked.reshape((-1,) + (1,) * (z.ndim - 1))
