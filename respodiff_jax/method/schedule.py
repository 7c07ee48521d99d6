"""Noise levels and timesteps of the samplers.

Notation: `alpha_bar` is the cumulative product of `1 - beta`, so that
`z_t = sqrt(alpha_bar) * z_0 + sqrt(1 - alpha_bar) * eps`. A *timestep* is what the UNet is asked
for (0 .. 999); a *ddim_index* counts the sampler's steps from pure noise (0) to the last
(`num_steps - 1`).
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32, Real

from respodiff_jax.errors import UserError, check_choice

SAMPLERS = ("ddim", "ddim-diffusers", "dpm++", "euler")

# What the samplers "dpm++" and "euler" compute, of the options with which diffusers changes them.
_PLAIN = {
    "algorithm_type": ("dpmsolver++", "deis"),
    "euler_at_final": (False,),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-float("inf"),),
    "lower_order_final": (True,),
    "solver_order": (2,),
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
}
_ALMOST_PURE_NOISE = 2.0**-24  # stands for 0 where its logarithm is needed, as in diffusers


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A sampler of a frozen model: timesteps and noise levels of its steps.

    Attributes:
      timesteps: the UNet's timestep at each ddim_index, descending; whole numbers, except for the
        sampler "euler" with the spacing "linspace".
      alpha_bars: `alpha_bar` at each ddim_index.
      next_alpha_bars: `alpha_bar` that the step leads to.
      prediction_type: "epsilon" or "v_prediction", what the UNet predicts.
      sampler: one of `SAMPLERS`.
      initial_scale: factor of the pure noise that sampling starts from.
    """

    timesteps: Int32[np.ndarray, "S"] | Float32[np.ndarray, "S"]
    alpha_bars: Float32[np.ndarray, "S"]
    next_alpha_bars: Float32[np.ndarray, "S"]
    prediction_type: str
    sampler: str = "ddim"
    initial_scale: float = 1.0

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], num_steps: int, sampler: str = "ddim"
    ) -> "Schedule":
        """Builds the schedule that diffusers' scheduler makes of the same config.

        * "ddim" (Song et al. 2021) is the paper's, as `DDIMScheduler`. Each step leads to the next
          timestep. In diffusers it leads to `t - 1000 // num_steps`, which for "linspace", and for
          "trailing" with a number of steps that does not divide 1000, is another noise level.
        * "ddim-diffusers" leads where diffusers does.
        * "dpm++" is DPM-Solver++(2M) (Lu et al. 2022), as `DPMSolverMultistepScheduler`.
        * "euler" (Karras et al. 2022, algorithm 1 without a correction) as
          `EulerDiscreteScheduler`. On these latents its step is DDIM's; timesteps and end differ.

        Args:
          config: contents of a pipeline's `scheduler/scheduler_config.json`, of any scheduler
            class.
          num_steps: number of sampling steps, at most the number of training timesteps.
          sampler: one of `SAMPLERS`.

        Raises:
          UserError: for a sampler, a number of steps, a beta schedule, a spacing or a prediction
            type that does not exist, an option that the sampler does not compute, or noise levels
            that begin at pure noise where the UNet predicts epsilon.

        Deviation: latents are never clipped (`clip_sample`), as Stable Diffusion pipelines require.
        """
        prediction_type = config.get("prediction_type", "epsilon")
        check_choice("scheduler prediction_type", prediction_type, ("epsilon", "v_prediction"))
        check_choice("`sampler`", sampler, SAMPLERS)
        is_ddim = sampler.startswith("ddim")
        if not is_ddim:
            _check_plain(config, sampler)
        alpha_bars = _alpha_bars(config)
        timesteps = _timesteps(config, num_steps, sampler)
        if timesteps[0] >= len(alpha_bars):
            raise UserError(
                f"{num_steps} sampling steps with steps_offset={config.get('steps_offset', 0)} ask"
                f" for timestep {timesteps[0]}, but the model was trained on"
                f" 0..{len(alpha_bars) - 1}; use fewer steps"
            )
        if prediction_type == "epsilon" and alpha_bars[int(timesteps[0])] == 0:
            raise UserError(
                "the scheduler begins at pure noise (rescale_betas_zero_snr), where a model with"
                " prediction_type 'epsilon' predicts nothing; expected 'v_prediction'"
            )
        if not is_ddim and config.get("rescale_betas_zero_snr", False):
            alpha_bars[-1] = _ALMOST_PURE_NOISE
        levels = _interpolate(alpha_bars, timesteps)
        ends_clean = not is_ddim or config.get("set_alpha_to_one", True)
        final = 1.0 if ends_clean else alpha_bars[0]
        next_levels = np.append(levels[1:], final)
        if is_ddim:
            next_timesteps = timesteps - len(alpha_bars) // num_steps
            uniform = np.where(next_timesteps >= 0, alpha_bars[next_timesteps], final)
            if sampler == "ddim-diffusers":
                next_levels = uniform
            elif np.any(uniform != next_levels):
                warnings.warn(
                    f"{num_steps} steps with timestep_spacing {config['timestep_spacing']!r}: each"
                    " step leads to the next timestep, which diffusers' DDIMScheduler misses; for"
                    " its pictures use the sampler 'ddim-diffusers'",
                    stacklevel=2,
                )
        # diffusers starts "euler" from noise of the first level's deviation or, with "leading",
        # from the clean image's plus the noise's.
        starts_short = sampler == "euler" and config.get("timestep_spacing") != "leading"
        return cls(
            timesteps=timesteps.astype(np.int32 if timesteps.dtype.kind == "i" else np.float32),
            alpha_bars=levels.astype(np.float32),
            next_alpha_bars=next_levels.astype(np.float32),
            prediction_type=prediction_type,
            sampler=sampler,
            initial_scale=float(np.sqrt(1 - levels[0])) if starts_short else 1.0,
        )


def _check_plain(config: Mapping[str, Any], sampler: str) -> None:
    for option, accepted in _PLAIN.items():
        if option in config and config[option] not in accepted:
            raise UserError(
                f"the model's scheduler has {option} {config[option]!r}, which `sampler`"
                f" {sampler!r} does not compute; use 'ddim'"
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


def _timesteps(config: Mapping[str, Any], num_steps: int, sampler: str) -> Real[np.ndarray, "S"]:
    """Timesteps of the sampler, descending."""
    n = config.get("num_train_timesteps", 1000)
    if not 1 <= num_steps <= n:
        raise UserError(f"number of sampling steps is {num_steps}, expected 1..{n}")
    default = "leading" if sampler.startswith("ddim") else "linspace"
    spacing = config.get("timestep_spacing", default)
    # DPM-Solver++ leaves out the last of one step more.
    extra = 1 if sampler == "dpm++" else 0
    if spacing == "leading":
        steps = np.arange(num_steps + extra)[::-1] * (n // (num_steps + extra))
        return steps[:num_steps] + config.get("steps_offset", 0)
    if spacing == "trailing":
        # Rounding errors can make `arange` end one step too late.
        return np.round(np.arange(n, 0, -n / num_steps)).astype(np.int64)[:num_steps] - 1
    if spacing == "linspace":
        steps = np.linspace(0, n - 1, num_steps + extra)[::-1][:num_steps]
        return steps if sampler == "euler" else np.round(steps).astype(np.int64)
    raise UserError(
        f"scheduler timestep_spacing is {spacing!r}, expected 'leading', 'trailing' or 'linspace'"
    )


def _interpolate(
    alpha_bars: Float64[np.ndarray, "T"], timesteps: Real[np.ndarray, "S"]
) -> Float64[np.ndarray, "S"]:
    """`alpha_bar` at timesteps; between whole ones `sqrt(1 / alpha_bar - 1)` is linear."""
    if timesteps.dtype.kind == "i":
        return alpha_bars[timesteps]
    sigma = np.interp(timesteps, np.arange(len(alpha_bars)), np.sqrt(1 / alpha_bars - 1))
    return 1 / (1 + sigma**2)
