"""RAM and SAM: architectures compared with PyTorch, initialisation, weighted sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from respodiff_jax.bench.torch_side import TorchModule, to_torch
from respodiff_jax.errors import UserError
from respodiff_jax.method.modules import KINDS, MidBlockModule, Steering, add_delta, steer

SHAPE = (4, 4, 24)


def make(kind, init_scheme="uniform", concepts=1):
    module = MidBlockModule(kind, SHAPE, hidden_channels=10, init_scheme=init_scheme)
    keys = jax.random.split(jax.random.key(0), concepts)
    return module, jax.vmap(module.init_params)(keys)


def one(params, i=0):
    return jax.tree.map(lambda x: x[i], params)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_module_changes_nothing_bit_for_bit(kind):
    module, params = make(kind, "zeros")
    for dtype in (jnp.float32, jnp.bfloat16):
        h = jax.random.normal(jax.random.key(1), (2, *SHAPE), dtype)
        steering = Steering(params, params, *jnp.ones((2, 2, 1)))
        np.testing.assert_array_equal(steer([module], [steering], np.zeros(2), h), h)
        np.testing.assert_array_equal(add_delta(h, module.delta(one(params), h)), h)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_equal_pytorch(kind):
    module, params = make(kind)
    h = jax.random.normal(jax.random.key(1), (2, *SHAPE))
    ours = jnp.broadcast_to(module.delta(one(params), h), h.shape)
    theirs = TorchModule(kind, one(params))(to_torch(h)).expand(2, 24, 4, 4).detach()
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-5)


@pytest.mark.parametrize(("kind", "limit"), [("constant", 10), ("mlp", 10), ("conv", 90)])
def test_uniform_initialisation_fills_its_range(kind, limit):
    _, params = make(kind)
    values = params["constant"] if kind == "constant" else params["out"]["kernel"]
    largest = float(jnp.abs(values).max())
    assert 0.95 * limit**-0.5 < largest <= limit**-0.5
    assert abs(float(values.mean())) < 0.1 * limit**-0.5


@pytest.mark.parametrize("kind", KINDS)
def test_steering_is_a_weighted_sum_for_each_sample(kind):
    module, ram = make(kind, concepts=3)
    sam = jax.tree.map(lambda x: 0.5 * x, ram)
    h = jax.random.normal(jax.random.key(1), (2, *SHAPE))
    ram_scale = jnp.array([[1.0, 0.0, 0.0], [0.6, 0.0, 0.4]])
    sam_scale = jnp.array([[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
    max_timestep = jnp.array([[900, 900, 901], [jnp.inf, 899, 900]])
    expected = np.array(h)
    for b in range(2):
        row, timestep = h[b : b + 1], 900 + b
        for n in range(3):
            if timestep <= max_timestep[b, n]:
                expected[b] += ram_scale[b, n] * module.delta(one(ram, n), row)[0]
                expected[b] += sam_scale[b, n] * module.delta(one(sam, n), row)[0]
    steering = Steering(ram, sam, ram_scale, sam_scale, max_timestep)
    ours = steer([module], [steering], np.array([900, 901]), h)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "linear"}, "kind is 'linear', expected one of constant, mlp, conv"),
        ({"kind": "mlp+mlp"}, "kind is 'mlp.mlp', expected one of constant, mlp, conv"),
        ({"kind": "mlp+"}, "kind is 'mlp.', expected"),
        ({"kind": None}, "kind is None, expected"),
        ({"kind": "mlp", "init_scheme": "ones"}, "init is 'ones'"),
        ({"kind": "mlp", "hidden_channels": 0}, "hidden_channels is 0"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        MidBlockModule(mid_block_shape=SHAPE, **fields)
