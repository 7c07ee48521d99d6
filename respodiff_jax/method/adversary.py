"""An adversary in training: some samples have text states that undo the modules.

Deviation: the paper has no adversary.

The text states `c` of an attacked sample are shifted. Every few training steps Adam looks for new
shifts, from noise, with which the steered model predicts what the base model predicts for the
prompt itself,

    sum || eps(z_t, c + delta; RAM + SAM) - eps(z_t, c; 0) ||^2  ->  min over delta

Samples do not disturb each other, since Adam scales each element's step by itself. A shift stays
until the next attack. RAM's loss uses `c + delta`, with the target of the prompt. SAM's loss of the
sample is 0: it would restore what the prompt asks for. A streaming trajectory advances with the
attacked prediction.
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
      every: training steps between attacks, 1 or more.
      steps: of Adam, for each attack, 1 or more.
      rate: Adam's learning rate, and the standard deviation of the noise from which it starts.
      share: probability that a sample is attacked, above 0, at most 1.
    """

    every: int
    steps: int
    rate: float
    share: float

    def init(self, batch_size: int, context_shape: tuple[int, int]) -> Attack:
        """No attack yet; the first step makes one. `context_shape` is `(L, D)`."""
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
        """A new attack every `every` steps, else the given one.

        Args:
          attack: the last step's.
          step: training steps done.
          keys: random keys.
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
