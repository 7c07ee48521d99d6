"""Rollouts: trajectories of the neutral prompt, at whose latents the losses are evaluated.

A rollout is an object with three pure functions, written for one concept:

* `init(samples) -> state`: what the rollout carries from step to step. It is part of the
  checkpointed training state; its leaves have a leading sample axis B.
* `draw(state, samples, predict) -> Latents`: the latents of this step.
* `advance(state, samples, latents, output) -> state`: where the trajectories go, given the guided
  model output at these latents.

`has_loop` says whether `draw` runs a loop of DDIM steps. Cost estimates need to know, since XLA
counts a loop's body once.

`FaithfulRollout` is the paper's: it carries nothing and runs every trajectory from pure noise.
`StreamingRollout` keeps trajectories in flight and advances them with the losses' own predictions.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, Int32, Key

from respodiff_jax.method import diffusion
from respodiff_jax.method.diffusion import DdimIndex, Latent
from respodiff_jax.method.schedule import Schedule

# (z_t, ddim_index, prompt_index) -> guided, steered model output.
Predict = Callable[[Latent, DdimIndex, Int32[ArrayLike, "B"]], Latent]


class Samples(NamedTuple):
    """What the B samples of one concept draw their noise and prompts from.

    Attributes:
      keys: random keys.
      num_prompts: number of neutral prompts.
      latent_shape: `(h, w, c)`.
      step_key: random key that all samples and concepts of a step share; None before the first.
    """

    keys: Key[Array, "B"]
    num_prompts: Int32[ArrayLike, ""]
    latent_shape: tuple[int, int, int]
    step_key: Key[Array, ""] | None = None


class Latents(NamedTuple):
    """Latents of one step.

    Attributes:
      ddim_index: their place on the schedule.
      prompt_index: the neutral prompt that each was made with.
    """

    z_t: Latent
    ddim_index: DdimIndex
    prompt_index: Int32[ArrayLike, "B"]


def last_loss_index(schedule: Schedule) -> int:
    """The largest ddim_index at which a loss is evaluated, num_steps - 2.

    A faithful rollout draws k uniformly from 0 to this number (paper, section 4.3).
    """
    return schedule.num_steps - 2


def run_trajectory(
    schedule: Schedule,
    predict: Predict,
    noise: Latent,
    prompt_index: Int32[ArrayLike, "B"],
    k: Int[ArrayLike, ""],
) -> Latents:
    """`k` DDIM steps from given noise (paper, section 4.3).

    Args:
      schedule: DDIM schedule.
      predict: guided prediction, for example `partial(guided_prediction, ...)`.
      noise: pure noise.
      prompt_index: the neutral prompt of each sample.
      k: number of steps, 0 .. `last_loss_index(schedule)`; may be traced.
    """

    def body(i, z_t):
        return diffusion.ddim_step(schedule, predict(z_t, i, prompt_index), z_t, i)

    return Latents(jax.lax.fori_loop(0, k, body, noise), k, prompt_index)


@dataclasses.dataclass(frozen=True)
class FaithfulRollout:
    """Trajectories of `k ~ U{0 .. num_steps - 2}` DDIM steps (paper, section 4.3).

    The neutral prompt is guided with RAM and SAM active on the conditional half, which `predict`
    does. `k` is drawn once for a training step, from the run's stream: the loop then has the same
    dynamic length for all samples and concepts, and a concept sees the same `k` whatever it is
    trained with.

    Deviation: the authors' code asks the UNet for timestep `1000 - 20 k` where the latent's noise
    level is that of timestep `981 - 20 k`; here the timestep is the one the latent is at.
    """

    schedule: Schedule
    has_loop: ClassVar[bool] = True

    def init(self, samples: Samples) -> tuple[()]:
        return ()

    def draw(self, state: tuple[()], samples: Samples, predict: Predict) -> Latents:
        """Runs the trajectories."""
        k = jax.random.randint(samples.step_key, (), 0, last_loss_index(self.schedule) + 1)
        noise, prompt_index = _begin(samples)
        return run_trajectory(self.schedule, predict, noise, prompt_index, k)

    def advance(
        self, state: tuple[()], samples: Samples, latents: Latents, output: Latent
    ) -> tuple[()]:
        return state


class Flight(NamedTuple):
    """Trajectories in flight, one for each of B samples.

    Attributes:
      z_t: their latents.
      ddim_index: where each trajectory is.
      last_index: where each trajectory ends, at most `last_loss_index(schedule)`.
      prompt_index: the neutral prompt of each trajectory.
    """

    z_t: Latent
    ddim_index: Int32[ArrayLike, "B"]
    last_index: Int32[ArrayLike, "B"]
    prompt_index: Int32[ArrayLike, "B"]


@dataclasses.dataclass(frozen=True)
class StreamingRollout:
    """Trajectories that advance by one DDIM step after the losses were evaluated at them.

    Classifier-free guidance combines two predictions that the losses compute anyway: the one with
    RAM and SAM, and the base model's for the empty prompt. So a rollout costs no UNet evaluation.

    A trajectory starts from pure noise at a random index below `stride`, and the losses are
    evaluated at every `stride`-th index up to num_steps - 2. Then it restarts with new noise and a
    new prompt. The first trajectories end at random indices, so that the samples are at different
    places. Once all of these have ended, the index of a sample is uniform at every step, as in the
    faithful form. Until then, late indices are rare.

    Deviation: DDIM steps are `stride` times as long as in the faithful form, and pure noise is used
    as the latents of the first `stride` indices. In n steps a sample sees about
    `n * stride / (num_steps - 1)` trajectories, in the faithful form n. Each DDIM step uses the
    modules at the time of that step, and SAM before its update; the paper runs whole trajectories
    with the newest modules.
    """

    schedule: Schedule
    stride: int
    has_loop: ClassVar[bool] = False

    def init(self, samples: Samples) -> Flight:
        noise, prompt_index = _begin(samples)
        end = _draw_below(samples, last_loss_index(self.schedule) + 1)
        return Flight(noise, end % self.stride, end, prompt_index)

    def draw(self, state: Flight, samples: Samples, predict: Predict) -> Latents:
        """The latents in flight; nothing is computed."""
        return Latents(state.z_t, state.ddim_index, state.prompt_index)

    def advance(self, state: Flight, samples: Samples, latents: Latents, output: Latent) -> Flight:
        """Takes each trajectory's next DDIM step, or starts the trajectory again."""
        to_index = latents.ddim_index + self.stride
        moved = Flight(
            diffusion.ddim_step(self.schedule, output, latents.z_t, latents.ddim_index, to_index),
            to_index,
            state.last_index,
            latents.prompt_index,
        )
        noise, prompt_index = _begin(samples)
        end = jnp.full_like(state.last_index, last_loss_index(self.schedule))
        fresh = Flight(noise, _draw_below(samples, self.stride), end, prompt_index)
        ended = to_index > state.last_index

        def restarted(new, old):
            return jnp.where(ended.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        return jax.tree.map(restarted, fresh, moved)


Rollout = FaithfulRollout | StreamingRollout


def _begin(samples: Samples) -> tuple[Latent, Int32[Array, "B"]]:
    """Pure noise and a neutral prompt for each sample."""
    prompt_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(samples.keys)
    prompt_index = jax.vmap(lambda key: jax.random.randint(key, (), 0, samples.num_prompts))(
        prompt_keys
    )
    noise = jax.vmap(lambda key: jax.random.normal(key, samples.latent_shape))(noise_keys)
    return noise, prompt_index


def _draw_below(samples: Samples, limit: int) -> Int32[Array, "B"]:
    """An integer of 0 .. limit - 1 for each sample.

    `_begin` splits each key in two; this is a third, independent use of it.
    """
    return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 2), (), 0, limit))(
        samples.keys
    )
