"""An adversary in training: some samples are trained at prompts that undo the modules best.

Deviation: the paper has no adversary.

A sample that is attacked has a change of its prompt's text states, `c + delta`.
Every few steps it is drawn again: from noise, some steps of Adam make the steered model predict
what the base model predicts for the prompt itself,

    mean || eps(z_t, c + delta; RAM + SAM) - eps(z_t, c; 0) ||^2  ->  min over delta

RAM's loss is then evaluated at `c + delta`, with the target of the prompt. SAM's loss is left out:
it would restore what the prompt asks for.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float32, Int32, Key

from respodiff_jax.backbone import Conditioning
from respodiff_jax.method.diffusion import Latent


class Attack(NamedTuple):
    """What is added to the text states of each of B samples, and which of them are attacked."""

    delta: Float32[Array, "B L D"]
    is_attacked: Bool[Array, "B"]

    def change(self, cond: Conditioning) -> Conditioning:
        """The conditioning of the attacked prompts."""
        added = jnp.where(self.is_attacked[:, None, None], self.delta, 0)
        return cond._replace(context=(cond.context + added).astype(cond.context.dtype))

    def keep(self, attacked: Latent, other: Latent) -> Latent:
        """`attacked` where a sample is attacked, without a gradient, and `other` elsewhere."""
        chosen = self.is_attacked[:, None, None, None]
        return jnp.where(chosen, jax.lax.stop_gradient(attacked), other)


class Attacked(NamedTuple):
    """The state of a rollout together with the attack on its samples."""

    rollout: Any
    attack: Attack


@dataclasses.dataclass(frozen=True)
class Adversary:
    """How training samples are attacked.

    Attributes:
      every: training steps from one attack of a sample to the next.
      steps: of Adam, for each attack.
      rate: Adam's learning rate, and the deviation of the noise from which it starts.
      share: of the samples that are attacked.
    """

    every: int
    steps: int
    rate: float
    share: float

    def init(self, batch_size: int, context_shape: tuple[int, int]) -> Attack:
        """The state before the first step, which attacks."""
        shape = batch_size, *context_shape
        return Attack(jnp.zeros(shape, jnp.float32), jnp.zeros(batch_size, bool))

    def renew(
        self,
        attack: Attack,
        step: Int32[ArrayLike, ""],
        keys: Key[Array, "B"],
        target: Callable[[], Latent],
        predict: Callable[[Attack], Latent],
    ) -> Attack:
        """The attack of this step: every `every` steps a new one.

        Args:
          attack: of the step before.
          step: training steps that were taken.
          keys: one for each sample.
          target: the base model's predictions for the prompts themselves.
          predict: the steered model's predictions for the attacked prompts.
        """
        optimizer = optax.adam(self.rate)

        def new():
            goal = target()

            def begin(key):
                noise_key, share_key = jax.random.split(key)
                noise = jax.random.normal(noise_key, attack.delta.shape[1:])
                return self.rate * noise, jax.random.bernoulli(share_key, self.share)

            start, is_attacked = jax.vmap(begin)(keys)

            def loss(delta):
                return jnp.sum(jnp.square(predict(Attack(delta, is_attacked)) - goal))

            def descend(_, carry):
                delta, state = carry
                updates, state = optimizer.update(jax.grad(loss)(delta), state)
                return optax.apply_updates(delta, updates), state

            carry = jax.lax.fori_loop(0, self.steps, descend, (start, optimizer.init(start)))
            return Attack(carry[0], is_attacked)

        return jax.lax.cond(step % self.every == 0, new, lambda: attack)
