"""Neutral latents: where along the frozen model's own trajectories the losses are evaluated.

A rollout is an object with three functions, written for one concept and pure:

* `init(keys, num_prompts, shape) -> state`: what it carries from step to step, part of the
  checkpointed training state; leaves have a leading sample axis B.
* `draw(state, predict, keys, step_key, num_prompts, shape) -> Draw`: this step's latents.
* `advance(state, draw, guided, keys, num_prompts) -> state`: what it makes of the losses'
  predictions.

`uses_losses` says whether `advance` asks for the predictions.

`FaithfulRollout` is the paper's: it keeps nothing and runs every trajectory from pure noise.
`StreamingRollout` keeps trajectories in flight and moves them on with the losses' own predictions.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from respodiff_jax.method import diffusion

# (z_t (B, h, w, c), ddim_index, prompt_index (B,)) -> guided, steered model output (B, h, w, c).
Predict = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Draw(NamedTuple):
    """Latents of one step.

    Attributes:
      z_t: latents, float32 `(B, h, w, c)`.
      ddim_index: int32 `()` or `(B,)`, where on the schedule they are.
      prompt_index: int32 `(B,)`, which neutral prompt each was made with.
    """

    z_t: jax.Array
    ddim_index: jax.Array
    prompt_index: jax.Array


def last_index(schedule: diffusion.Schedule) -> int:
    """Where the longest trajectories end; from 0 to it, `k` is uniform (paper, section 4.3)."""
    return schedule.num_steps - 2


@dataclasses.dataclass(frozen=True)
class FaithfulRollout:
    """`k ~ U{0 .. num_steps - 2}` DDIM steps from pure noise (paper, section 4.3).

    The neutral prompt is guided with RAM and SAM active on the conditional half (that is
    `predict`). `k` is drawn once for a training step, from the run's stream: the loop then has the
    same dynamic length for all samples and concepts, and a concept sees the same `k` whatever it is
    trained with.

    Deviation: the authors' code asks the UNet for timestep `1000 - 20 k` where the latent's noise
    level is that of timestep `981 - 20 k`; here the timestep is the one the latent is at.
    """

    schedule: diffusion.Schedule
    uses_losses: ClassVar[bool] = False

    def init(self, keys: jax.Array, num_prompts: jax.Array, shape: tuple[int, ...]) -> tuple[()]:
        del keys, num_prompts, shape
        return ()

    def draw(
        self,
        state: tuple[()],
        predict: Predict,
        keys: jax.Array,
        step_key: jax.Array,
        num_prompts: jax.Array,
        shape: tuple[int, int, int],
    ) -> Draw:
        """Runs the trajectories.

        Args:
          state: empty.
          predict: the guided prediction.
          keys: `(B,)`, each sample's own.
          step_key: shared by all samples and concepts of the step.
          num_prompts: int32 `()`, number of neutral prompts to draw from.
          shape: `(h, w, c)` of the latents.
        """
        del state
        k = jax.random.randint(step_key, (), 0, last_index(self.schedule) + 1)
        noise, prompt_index = _begin(keys, num_prompts, shape)

        def body(i, z_t):
            return diffusion.ddim_step(self.schedule, predict(z_t, i, prompt_index), z_t, i)

        return Draw(jax.lax.fori_loop(0, k, body, noise), k, prompt_index)

    def advance(self, state, draw, guided, keys, num_prompts) -> tuple[()]:
        del draw, guided, keys, num_prompts
        return state


class Flight(NamedTuple):
    """Trajectories in flight, one for each of B samples.

    Attributes:
      z_t: float32 `(B, h, w, c)`.
      ddim_index: int32 `(B,)`, where each is.
      last_index: int32 `(B,)`, where each ends.
      prompt_index: int32 `(B,)`, its neutral prompt.
    """

    z_t: jax.Array
    ddim_index: jax.Array
    last_index: jax.Array
    prompt_index: jax.Array


@dataclasses.dataclass(frozen=True)
class StreamingRollout:
    """Trajectories that move on by a DDIM step whenever the losses have looked at them.

    The losses need the prediction with RAM and SAM, and their three predictions of the base model
    include the empty prompt's; guided, these are what `predict` would give. So no evaluation of the
    UNet is spent on a rollout.

    A trajectory is pure noise at an index below `stride`, drawn for it; it is then looked at at
    every `stride`-th index up to num_steps - 2, and starts again from fresh noise and a fresh
    prompt. The first ones end at random indices, which staggers them: once all have ended, the
    index of a sample is uniform at every step, as in the faithful form. Before, late indices are
    rare.

    Deviation: DDIM steps are `stride` times as long as the faithful form's, and pure noise stands
    for latents of the first `stride` indices. n steps see about `n * stride / (num_steps - 1)`
    trajectories a sample, where the faithful form sees n. The steps of a trajectory were taken with
    the modules of the time, each an optimiser step older than the next, and with the SAM from
    before the step's update; the paper runs whole trajectories with the newest modules.
    """

    schedule: diffusion.Schedule
    stride: int
    uses_losses: ClassVar[bool] = True

    def init(self, keys: jax.Array, num_prompts: jax.Array, shape: tuple[int, int, int]) -> Flight:
        noise, prompt_index = _begin(keys, num_prompts, shape)
        end = _draw_below(keys, last_index(self.schedule) + 1)
        return Flight(noise, end % self.stride, end, prompt_index)

    def draw(
        self,
        state: Flight,
        predict: Predict,
        keys: jax.Array,
        step_key: jax.Array,
        num_prompts: jax.Array,
        shape: tuple[int, int, int],
    ) -> Draw:
        """The latents in flight; nothing is computed."""
        del predict, keys, step_key, num_prompts, shape
        return Draw(state.z_t, state.ddim_index, state.prompt_index)

    def advance(
        self,
        state: Flight,
        draw: Draw,
        guided: Callable[[], jax.Array],
        keys: jax.Array,
        num_prompts: jax.Array,
    ) -> Flight:
        """Takes each trajectory's DDIM step, or starts it again.

        Args:
          state: before.
          draw: what the losses looked at.
          guided: gives the guided model output there, `(B, h, w, c)`.
          keys: `(B,)`, each sample's own.
          num_prompts: int32 `()`.
        """
        to_index = draw.ddim_index + self.stride
        moved = Flight(
            diffusion.ddim_step(self.schedule, guided(), draw.z_t, draw.ddim_index, to_index),
            to_index,
            state.last_index,
            draw.prompt_index,
        )
        noise, prompt_index = _begin(keys, num_prompts, draw.z_t.shape[1:])
        end = jnp.full_like(state.last_index, last_index(self.schedule))
        fresh = Flight(noise, _draw_below(keys, self.stride), end, prompt_index)
        ended = to_index > state.last_index

        def restarted(new, old):
            return jnp.where(ended.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        return jax.tree.map(restarted, fresh, moved)


def _begin(
    keys: jax.Array, num_prompts: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Pure noise `(B, *shape)` and a neutral prompt for each key."""
    prompt_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    prompt_index = jax.vmap(lambda key: jax.random.randint(key, (), 0, num_prompts))(prompt_keys)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(noise_keys), prompt_index


def _draw_below(keys: jax.Array, limit: int) -> jax.Array:
    """An integer of 0 .. limit - 1 for each key; `_begin` splits it in two, this is a third."""
    return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 2), (), 0, limit))(keys)


KINDS = ("faithful", "streaming")
Rollout = FaithfulRollout | StreamingRollout


def make_rollout(config: ConfigDict, schedule: diffusion.Schedule) -> Rollout:
    """The rollout of the config's `rollout` section, along a schedule of its `num_steps`."""
    if config.kind == "faithful":
        return FaithfulRollout(schedule)
    num_indices = last_index(schedule) + 1
    return StreamingRollout(schedule, stride=math.ceil(num_indices / config.trajectory_steps))
