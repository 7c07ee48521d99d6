"""The same adapters on one device and on eight, under both strategies."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import MAN, VIOLENCE, WOMAN, setup

from respodiff_jax.errors import UserError
from respodiff_jax.method.train_step import train_step
from respodiff_jax.training import parallel

STEPS, BATCH = 2, 8
ROLLOUT = {"rollout.trajectory_steps": 3}  # streaming samples are at different indices


def modules(state):
    return np.concatenate(
        [np.asarray(x).ravel() for x in jax.tree.leaves((state.concepts.ram, state.concepts.sam))]
    )


def train_on_all_devices(backbone, concepts, strategy, rollout):
    """Modules after some steps, metrics of the last step, and the placement."""
    changes = ROLLOUT | {"rollout.kind": rollout}
    spec, arrays, fresh, _ = setup(backbone, concepts, BATCH, **changes)
    placement = parallel.Placement(strategy, len(concepts), BATCH)
    state = placement.place_state(fresh)
    frozen = placement.replicate({"unet": backbone.params["unet"]})
    placed = placement.place_concepts(arrays)
    step = placement.compile(partial(train_step, spec))
    for _ in range(STEPS):
        state, metrics = step(state, frozen, placed)
    metrics = placement.fetch(metrics)
    assert metrics.loss_resp.shape == (len(concepts),)
    return modules(placement.fetch(state)), metrics, placement


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
    ("concepts", "strategy", "rollout", "shards"),
    [
        pytest.param([WOMAN], "pmap", "streaming", (1, 8), marks=pytest.mark.slow),
        ([WOMAN, VIOLENCE], "pmap", "faithful", (2, 4)),
        ([WOMAN, VIOLENCE], "mesh", "streaming", (2, 4)),
    ],
)
def test_eight_devices_train_the_same_as_one(
    tiny_backbone, on_one_device, concepts, strategy, rollout, shards
):
    found, metrics, placement = train_on_all_devices(tiny_backbone, concepts, strategy, rollout)
    assert placement.mesh.devices.shape == shards
    expected, expected_metrics = on_one_device(concepts, rollout)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    # Streaming samples, and so devices, are at different indices.
    np.testing.assert_allclose(metrics.ddim_index, expected_metrics.ddim_index, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["pmap", "mesh"])
def test_state_is_unchanged_by_placing_and_fetching(tiny_backbone, strategy):
    _, _, fresh, _ = setup(tiny_backbone, [WOMAN, MAN], BATCH, **{"module.init": "uniform"})
    placement = parallel.Placement(strategy, 2, BATCH)
    placed = placement.place_state(fresh)
    back = placement.fetch(placed)
    jax.tree.map(np.testing.assert_array_equal, back, fresh)


def test_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(
        UserError, match=r"train.batch_size is 6, expected a multiple of 4: 8 devices"
    ):
        parallel.Placement("pmap", 2, 6)


@pytest.mark.slow  # the short compilation of the other tests changes the last bits
def test_both_strategies_train_the_same_bit_for_bit(tiny_backbone):
    by_pmap, by_mesh = (
        train_on_all_devices(tiny_backbone, [WOMAN, VIOLENCE], strategy, "streaming")[0]
        for strategy in ("pmap", "mesh")
    )
    np.testing.assert_array_equal(by_pmap, by_mesh)
