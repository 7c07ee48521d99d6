"""The adversary in training: when it attacks, what it finds, and what the losses make of it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train_step import WOMAN, setup

from respodiff_jax.method.adversary import Adversary, Attack, Attacked
from respodiff_jax.method.objective import semantic_loss
from respodiff_jax.method.train_step import train_step

ADVERSARY = Adversary(every=3, steps=5, rate=0.1, share=0.5)
KEYS = jax.random.split(jax.random.key(1), 64)


def predict(attack):
    """Four numbers of each sample, which depend on its changed text states (2, 3) only."""
    states = jnp.where(attack.is_attacked[:, None, None], attack.delta, 0)
    weights = jnp.arange(24.0).reshape(6, 4) / 24
    return jnp.sin(states.reshape(len(states), 6) @ weights)[:, None, None]


def renew(step, attack=None):
    attack = ADVERSARY.init(64, (2, 3)) if attack is None else attack
    return ADVERSARY.renew(attack, step, KEYS, lambda: jnp.full((64, 1, 1, 4), 0.5), predict)


def test_attack_is_adams_descent_on_the_prediction():
    found = renew(0)
    assert 16 < found.is_attacked.sum() < 48
    row = int(np.flatnonzero(found.is_attacked)[0])
    noise_key, _ = jax.random.split(KEYS[row])
    delta = ADVERSARY.rate * jax.random.normal(noise_key, (2, 3))
    optimizer = optax.adam(ADVERSARY.rate)
    state = optimizer.init(delta)

    def loss(delta):
        one = Attack(delta[None], jnp.array([True]))
        return jnp.sum(jnp.square(predict(one) - 0.5))

    first = loss(delta)
    for _ in range(ADVERSARY.steps):
        updates, state = optimizer.update(jax.grad(loss)(delta), state)
        delta = optax.apply_updates(delta, updates)
    np.testing.assert_allclose(found.delta[row], delta, atol=1e-4)
    assert loss(delta) < first


def test_attack_lasts_until_it_is_drawn_again():
    attack = Attack(jnp.ones((64, 2, 3)), jnp.ones(64, bool))
    for step in (1, 2, 4):
        jax.tree.map(np.testing.assert_array_equal, renew(step, attack), attack)
    assert np.abs(renew(3, attack).delta - 1).max() > 0.1


def test_attacked_samples_have_no_semantic_loss():
    attack = Attack(jnp.zeros((2, 2, 3)), jnp.array([True, False]))
    base = jnp.zeros((2, 2, 2, 1))

    def loss(eps):
        return semantic_loss(eps, attack.keep(eps, base), 1.0)

    value, gradient = jax.value_and_grad(loss)(jnp.ones((2, 2, 2, 1)))
    assert value == pytest.approx(0.5)
    assert not gradient[0].any() and gradient[1].all()


@pytest.mark.slow
def test_training_step_attacks_the_prompt_and_steers_from_there(tiny_backbone):
    changes = {"adversary.every": 2, "adversary.steps": 2, "adversary.share": 1.0}
    spec, arrays, state, step = setup(tiny_backbone, [WOMAN], **changes)
    assert spec.adversary == Adversary(2, 2, 0.1, 1.0)
    assert isinstance(state.concepts.rollout, Attacked)
    # A module that changes something; without one the prompt is its own best attack.
    ram = jax.tree.map(lambda x: x + 0.3, state.concepts.ram)
    state = state.replace(concepts=state.concepts.replace(ram=ram))
    new, metrics = step(state, tiny_backbone.params, arrays, np.arange(2))
    attack = new.concepts.rollout.attack
    assert attack.is_attacked.all() and np.abs(attack.delta).max() > 0.1
    assert float(metrics.loss_sem[0]) == 0.0 and float(metrics.grad_norm_ram[0]) > 0
    newer, _ = step(new, tiny_backbone.params, arrays, np.arange(2))
    kept = newer.concepts.rollout.attack
    jax.tree.map(np.testing.assert_array_equal, kept, attack)
    # The same step of samples that are not attacked has another loss.
    _, plain = jax.jit(partial(train_plain, spec))(
        state, tiny_backbone.params, arrays, np.arange(2)
    )
    assert abs(float(plain.loss_resp[0] - metrics.loss_resp[0])) > 1e-6


def train_plain(spec, state, *args):
    spec = dataclasses.replace(spec, adversary=None)
    rollout = state.concepts.rollout.rollout
    state = state.replace(concepts=state.concepts.replace(rollout=rollout))
    return train_step(spec, state, *args)
