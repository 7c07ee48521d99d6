"""The same adapters on one device and on eight, under both strategies."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import MAN, VIOLENCE, WOMAN, setup

from respodiff_jax.method.train_step import train_step
from respodiff_jax.training import parallel

STEPS, BATCH = 2, 8
ROLLOUT = {"rollout.trajectory_steps": 3}  # of streaming: samples are at different places


def modules(state):
    return np.concatenate(
        [np.asarray(x).ravel() for x in jax.tree.leaves((state.concepts.ram, state.concepts.sam))]
    )


def train_on_all_devices(backbone, concepts, strategy, fsdp, rollout):
    """Modules after some steps, the last one's metrics, and the compiled placement."""
    changes = ROLLOUT | {"rollout.kind": rollout}
    recipe, arrays, fresh, _ = setup(backbone, concepts, BATCH, **changes)
    placement = parallel.make_placement(strategy, len(concepts), BATCH, fsdp)
    state = placement.place_state(placement.to_canonical_devices(fresh))
    frozen = placement.place_frozen({"unet": backbone.params["unet"]})
    placed = placement.place_concepts(arrays)
    step = placement.compile(partial(train_step, placement.prepare(recipe)))
    for _ in range(STEPS):
        state, metrics = step(state, frozen, placed)
    metrics = placement.fetch(placement.canonical(metrics))
    assert metrics.loss_resp.shape == (len(concepts),)
    return modules(placement.fetch(placement.canonical(state))), metrics, placement


@pytest.fixture(scope="module")
def on_one_device(tiny_backbone):
    """Modules of N concepts trained on one device with the whole batch, and the last metrics."""
    cache = {}

    def train(concepts, rollout):
        if (len(concepts), rollout) not in cache:
            changes = ROLLOUT | {"rollout.kind": rollout}
            _, arrays, state, step = setup(tiny_backbone, concepts, BATCH, **changes)
            for _ in range(STEPS):
                state, metrics = step(state, tiny_backbone.params, arrays, jnp.arange(BATCH))
            cache[len(concepts), rollout] = modules(state), metrics
        return cache[len(concepts), rollout]

    return train


@pytest.mark.parametrize(
    ("concepts", "strategy", "fsdp", "rollout", "shards"),
    [
        ([WOMAN], "pmap", False, "streaming", (1, 8)),
        ([WOMAN, VIOLENCE], "pmap", False, "faithful", (2, 4)),
        ([WOMAN, VIOLENCE], "mesh", False, "streaming", (2, 4)),
        ([WOMAN, VIOLENCE], "mesh", True, "faithful", (2, 4)),
    ],
)
def test_eight_devices_train_what_one_does(
    tiny_backbone, on_one_device, concepts, strategy, fsdp, rollout, shards
):
    found, metrics, placement = train_on_all_devices(
        tiny_backbone, concepts, strategy, fsdp, rollout
    )
    assert placement.mesh.devices.shape == shards
    expected, expected_metrics = on_one_device(concepts, rollout)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    # Where streaming looks differs from sample to sample, that is from device to device.
    np.testing.assert_allclose(metrics.ddim_index, expected_metrics.ddim_index, rtol=1e-6)


def test_fsdp_shards_the_frozen_parameters(tiny_backbone):
    placement = parallel.make_placement("mesh", 1, BATCH, fsdp=True)
    params = tiny_backbone.params["unet"]
    held = sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves(placement.place_frozen(params))
    )
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert held < 1.1 * whole / jax.device_count()


def test_fsdp_gathers_again_for_the_backward_pass(tiny_backbone):
    """Not once for both, which would keep what was gathered in between."""
    recipe, arrays, _, _ = setup(tiny_backbone, [WOMAN], BATCH)
    placement = parallel.make_placement("mesh", 1, BATCH, fsdp=True)
    recipe = placement.prepare(recipe)
    frozen = placement.place_frozen({"unet": tiny_backbone.params["unet"]})
    z_t, t = jnp.zeros((BATCH, *recipe.latent_shape)), jnp.zeros(BATCH, jnp.int32)
    conds = jax.tree.map(lambda x: jnp.repeat(x, BATCH, axis=0), arrays.own)
    h, skips = jax.eval_shape(recipe.encode, frozen, z_t, t, conds)

    def gathered_convolutions(function):
        program = jax.jit(function).lower(frozen, h, skips).compile().as_text()
        shapes = re.findall(r" = \w+\[([\d,]+)\]\S* all-gather\(", program)
        return Counter(shape for shape in shapes if shape.count(",") == 3)

    def loss(frozen, h, skips):
        return jnp.sum(recipe.decode(frozen, h, skips) ** 2)

    forward = gathered_convolutions(recipe.decode)
    assert forward.total() > 10
    assert gathered_convolutions(jax.grad(loss, argnums=1)) == forward + forward


@pytest.mark.parametrize("strategy", ["pmap", "mesh"])
def test_states_survive_the_way_to_the_devices_and_back(tiny_backbone, strategy):
    _, _, fresh, _ = setup(tiny_backbone, [WOMAN, MAN], BATCH, **{"module.init": "uniform"})
    placement = parallel.make_placement(strategy, 2, BATCH)
    placed = placement.place_state(placement.to_canonical_devices(fresh))
    back = placement.fetch(placement.canonical(placed))
    jax.tree.map(np.testing.assert_array_equal, back, fresh)


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(
        ValueError, match=r"train.batch_size is 6, expected a multiple of 4: 8 devices"
    ):
        parallel.make_placement("pmap", 2, 6)
