"""Neutral latents: where along the frozen model's own trajectories the losses are evaluated.

A rollout is an object with two functions, written for one concept and pure:

* `init(keys, shape) -> state`: what it carries from step to step, part of the checkpointed training
  state; leaves have a leading sample axis B.
* `draw(state, predict, keys, step_key, num_prompts, shape) -> (Draw, state)`: this step's latents.

`FaithfulRollout` is the paper's: it keeps nothing and runs every trajectory from pure noise.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from respodiff_jax import diffusion

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

    def init(self, keys: jax.Array, shape: tuple[int, int, int]) -> tuple[()]:
        del keys, shape
        return ()

    def draw(
        self,
        state: tuple[()],
        predict: Predict,
        keys: jax.Array,
        step_key: jax.Array,
        num_prompts: jax.Array,
        shape: tuple[int, int, int],
    ) -> tuple[Draw, tuple[()]]:
        """Runs the trajectories.

        Args:
          state: empty.
          predict: the guided prediction.
          keys: `(B,)`, each sample's own.
          step_key: shared by all samples and concepts of the step.
          num_prompts: int32 `()`, number of neutral prompts to draw from.
          shape: `(h, w, c)` of the latents.
        """
        k = jax.random.randint(step_key, (), 0, self.schedule.num_steps - 1)
        prompt_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        prompt_index = jax.vmap(lambda key: jax.random.randint(key, (), 0, num_prompts))(
            prompt_keys
        )
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(noise_keys)

        def body(i, z_t):
            return diffusion.ddim_step(self.schedule, predict(z_t, i, prompt_index), z_t, i)

        return Draw(jax.lax.fori_loop(0, k, body, noise), k, prompt_index), state


# By the config's `rollout.kind`.
ROLLOUTS = {"faithful": FaithfulRollout}
