"""Noise schedule, DDIM and classifier-free guidance of the frozen model (paper, section 3).

Notation: `alpha_bar` is the cumulative product of `1 - beta`, so that
`z_t = sqrt(alpha_bar) * z_0 + sqrt(1 - alpha_bar) * eps`. A *timestep* is what the UNet is asked
for (0 .. 999); a *ddim_index* counts the sampler's steps from pure noise (0) to the last
(`num_steps - 1`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float32, Float64, Int, Int32, Int64

from respodiff_jax.errors import UserError

Latent = Float32[ArrayLike, "B h w c"]
# One for all samples or, when they are at different steps, one for each.
DdimIndex = Int[ArrayLike, ""] | Int[ArrayLike, "B"]


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The DDIM sampler of a frozen model: timesteps and noise levels of its steps.

    Attributes:
      timesteps: the UNet's timestep at each ddim_index, descending.
      alpha_bars: `alpha_bar` at each ddim_index.
      next_alpha_bars: `alpha_bar` that the step leads to.
      prediction_type: "epsilon" or "v_prediction", what the UNet predicts.
    """

    timesteps: Int32[np.ndarray, "S"]
    alpha_bars: Float32[np.ndarray, "S"]
    next_alpha_bars: Float32[np.ndarray, "S"]
    prediction_type: str

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_steps: int) -> "Schedule":
        """Builds the DDIM schedule that `diffusers.DDIMScheduler.from_config(config)` would.

        Args:
          config: contents of a pipeline's `scheduler/scheduler_config.json`, of any scheduler
            class.
          num_steps: number of sampling steps, at most the number of training timesteps.

        Raises:
          UserError: for a number of steps, a beta schedule, a spacing or a prediction type that
            does not exist.

        Deviation: latents are never clipped (`clip_sample`), as Stable Diffusion pipelines require.
        """
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"scheduler prediction_type is {prediction_type!r},"
                " expected 'epsilon' or 'v_prediction'"
            )
        alpha_bars = _alpha_bars(config)
        timesteps = _ddim_timesteps(config, num_steps)
        if timesteps[0] >= len(alpha_bars):
            raise UserError(
                f"{num_steps} sampling steps with steps_offset={config.get('steps_offset', 0)} ask"
                f" for timestep {timesteps[0]}, but the model was trained on"
                f" 0..{len(alpha_bars) - 1}; use fewer steps"
            )
        next_timesteps = timesteps - len(alpha_bars) // num_steps
        final = 1.0 if config.get("set_alpha_to_one", True) else alpha_bars[0]
        next_alpha_bars = np.where(next_timesteps >= 0, alpha_bars[next_timesteps], final)
        return cls(
            timesteps=timesteps.astype(np.int32),
            alpha_bars=alpha_bars[timesteps].astype(np.float32),
            next_alpha_bars=next_alpha_bars.astype(np.float32),
            prediction_type=prediction_type,
        )


def _alpha_bars(config: Mapping[str, Any]) -> Float64[np.ndarray, "T"]:
    """`alpha_bar` at every training timestep.

    The betas are rounded to float32, as they were when the models were trained.
    """
    n = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"])
    elif kind == "linear":
        betas = np.linspace(start, end, n, dtype=np.float32)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, n, dtype=np.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        level = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
    else:
        raise UserError(
            f"scheduler beta_schedule is {kind!r},"
            " expected 'linear', 'scaled_linear' or 'squaredcos_cap_v2'"
        )
    alpha_bars = np.cumprod(1 - betas.astype(np.float32), dtype=np.float64)
    if config.get("rescale_betas_zero_snr", False):
        # Shift and scale sqrt(alpha_bar) so that the last one is 0 and the first stays.
        root = np.sqrt(alpha_bars)
        alpha_bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bars


def _ddim_timesteps(config: Mapping[str, Any], num_steps: int) -> Int64[np.ndarray, "S"]:
    """Timesteps of the sampler, descending."""
    n = config.get("num_train_timesteps", 1000)
    if not 1 <= num_steps <= n:
        raise UserError(f"number of sampling steps is {num_steps}, expected 1..{n}")
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "leading":
        return np.arange(num_steps)[::-1] * (n // num_steps) + config.get("steps_offset", 0)
    if spacing == "trailing":
        return np.round(np.arange(n, 0, -n / num_steps)).astype(np.int64) - 1
    if spacing == "linspace":
        return np.round(np.linspace(0, n - 1, num_steps))[::-1].astype(np.int64)
    raise UserError(
        f"scheduler timestep_spacing is {spacing!r}, expected 'leading', 'trailing' or 'linspace'"
    )


def predict_eps(
    schedule: Schedule, model_output: Latent, z_t: Latent, ddim_index: DdimIndex
) -> Latent:
    """The noise `eps` that a model output stands for.

    The objectives are written in eps (paper, equations 4-6), also for v-prediction models, where
    `eps = sqrt(alpha_bar) * v + sqrt(1 - alpha_bar) * z_t`.
    """
    if schedule.prediction_type == "epsilon":
        return model_output
    alpha_bar = _per_sample(schedule.alpha_bars, ddim_index, z_t)
    return jnp.sqrt(alpha_bar) * model_output + jnp.sqrt(1 - alpha_bar) * z_t


def ddim_step(
    schedule: Schedule,
    model_output: Latent,
    z_t: Latent,
    ddim_index: DdimIndex,
    to_index: DdimIndex | None = None,
) -> Latent:
    """One deterministic DDIM step (eta = 0); returns the latents to which it leads.

    Args:
      schedule: the sampler.
      model_output: the UNet's (guided) prediction at `z_t`.
      z_t: latents at `schedule.alpha_bars[ddim_index]`.
      ddim_index: where the step begins.
      to_index: where the step leads; by default to the next noise level, of which the last has no
        index.
    """
    alpha_bar = _per_sample(schedule.alpha_bars, ddim_index, z_t)
    if to_index is None:
        next_alpha_bar = _per_sample(schedule.next_alpha_bars, ddim_index, z_t)
    else:
        next_alpha_bar = _per_sample(schedule.alpha_bars, to_index, z_t)
    eps = predict_eps(schedule, model_output, z_t, ddim_index)
    if schedule.prediction_type == "epsilon":
        z_0 = (z_t - jnp.sqrt(1 - alpha_bar) * eps) / jnp.sqrt(alpha_bar)
    else:
        z_0 = jnp.sqrt(alpha_bar) * z_t - jnp.sqrt(1 - alpha_bar) * model_output
    return jnp.sqrt(next_alpha_bar) * z_0 + jnp.sqrt(1 - next_alpha_bar) * eps


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
    timesteps: Int32[ArrayLike, "B"],
    cond: Any,
    uncond: Any,
    guidance_scale: Float[ArrayLike, ""],
    steer: Callable[[Float[Array, "B H W C"]], Float[Array, "B H W C"]],
) -> Latent:
    """The guided model output, steered on the conditional half only (paper, section 4.4).

    The UNet is evaluated once, with 2B samples.

    Args:
      encode: `e(params, z_t, timesteps, cond) -> (h, skips)`.
      decode: `g(params, h, skips) -> output`.
      params: frozen parameters.
      z_t, timesteps: latents, and the timesteps that the UNet is asked for.
      cond, uncond: conditioning of the prompts and of the empty or negative prompts, leading
        axis B.
      guidance_scale: 1 means no guidance.
      steer: changes the conditional half's mid-block output.
    """
    both = concatenate(z_t, z_t), concatenate(timesteps, timesteps), concatenate(cond, uncond)
    h, skips = encode(params, *both)
    h_cond, h_uncond = split(h, 2)
    outputs = decode(params, concatenate(steer(h_cond), h_uncond), skips)
    return cfg_combine(*split(outputs, 2), guidance_scale)


def _per_sample(
    values: Float32[np.ndarray, "S"], ddim_index: DdimIndex, z: Latent
) -> Float32[Array, "#B 1 1 1"]:
    """`values[ddim_index]`, shaped to multiply `z`."""
    picked = jnp.asarray(values)[jnp.asarray(ddim_index)]
    return picked.reshape((-1,) + (1,) * (z.ndim - 1))
