"""Layers that compute what the stock ones compute, but faster."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.models.resnet_flax import FlaxUpsample2D
from diffusers.models.vae_flax import FlaxUpsample2D as VaeUpsample2D

from respodiff_jax.backbone.flax_models import match_pytorch, upsample_in_phases


def value_and_gradient(module, params, x, interceptor=None):
    """The module's output, and the gradient of half its sum of squares for x."""

    def apply(x):
        if interceptor is None:
            return module.apply({"params": params}, x)
        with nn.intercept_methods(interceptor):
            return module.apply({"params": params}, x)

    y, vjp = jax.vjp(apply, x)
    return y, *vjp(y)


@pytest.mark.parametrize("module", [FlaxUpsample2D(6), VaeUpsample2D(6)])
@pytest.mark.parametrize("height, width", [(1, 1), (3, 4)])
def test_upsampling_in_phases_equals_the_stock_layer(module, height, width):
    x = jax.random.normal(jax.random.key(0), (2, height, width, 6))
    params = module.init(jax.random.key(1), x)["params"]
    params["conv"]["bias"] = jnp.arange(6.0)
    stock = value_and_gradient(module, params, x)
    ours = value_and_gradient(module, params, x, upsample_in_phases)
    assert ours[0].shape == (2, 2 * height, 2 * width, 6)
    for a, b in zip(ours, stock, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_group_norm_equals_the_stock_layer(offset):
    module = nn.GroupNorm(4, epsilon=1e-5)
    x = offset + jax.random.normal(jax.random.key(0), (2, 3, 5, 12))
    params = {"scale": jnp.linspace(0.5, 2, 12), "bias": jnp.arange(12.0)}
    stock = value_and_gradient(module, params, x)
    for a, b in zip(value_and_gradient(module, params, x, match_pytorch), stock, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5, rtol=0)


def test_group_norm_keeps_the_dtype_and_needs_no_variance():
    x = jnp.full((1, 2, 2, 8), 3, jnp.bfloat16)
    params = {"scale": jnp.ones(8, jnp.bfloat16), "bias": jnp.arange(8, dtype=jnp.bfloat16)}
    y, gradient = value_and_gradient(nn.GroupNorm(4), params, x, match_pytorch)
    assert y.dtype == gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.broadcast_to(params["bias"], x.shape))
