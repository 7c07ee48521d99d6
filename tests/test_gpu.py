"""cuDNN's attention, and training in bfloat16, on an NVIDIA GPU: `pytest -m gpu`.

With this marker JAX uses the GPU; for the other tests it uses the CPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import assert_close, inputs, value_and_gradients
from test_train_step import relative_error

from respodiff_jax.backbone import architectures
from respodiff_jax.backbone.attention import attention, choose_attention
from respodiff_jax.bench.model import Setup
from respodiff_jax.generation.sampling import Sampler, SamplerOptions
from respodiff_jax.method.paper import GENDER
from respodiff_jax.method.train_step import train_step
from respodiff_jax.training.config import add_concepts, default
from respodiff_jax.training.parallel import Placement
from respodiff_jax.training.spec import open_model

pytestmark = pytest.mark.gpu

# A UNet of 6.6 M parameters with attention at two levels, and latents of 64 × 64 like SD 1.4.
_SMALL = architectures._TINY | {
    "unet": architectures._TINY["unet"]
    | {
        "sample_size": 64,
        "block_out_channels": (64, 128, 128),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    },
}


@pytest.fixture(autouse=True, scope="module")
def gpu():
    """Fails, rather than skips, without a GPU: `-m gpu` asked for these tests."""
    try:
        return jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.fail(
            "pytest -m gpu needs an NVIDIA GPU and a JAX that can use it, pip install -e"
            f' ".[cuda]": {error}'
        )


def test_bfloat16_uses_cudnn_and_float32_does_not():
    assert choose_attention("auto", jnp.dtype("bfloat16")) == "cudnn"
    assert choose_attention("auto", jnp.dtype("float32")) == "chunked"


@pytest.mark.parametrize("concepts", [None, 2])
@pytest.mark.parametrize(
    ("tokens", "keys", "head_dim"),
    [
        (4096, 4096, 40),  # SD 1.4, self- and cross-attention
        (4096, 77, 40),
        (1024, 1024, 80),
        (4096, 4096, 64),  # SDXL
        (4096, 77, 64),
    ],
)
def test_cudnn_equals_plain(tokens, keys, head_dim, concepts):
    """Compares values and gradients, alone and with the leading axis of the step's `vmap`."""
    args = inputs(tokens, keys, 8, head_dim, batch=2 * (concepts or 1), dtype=jnp.bfloat16)
    with jax.default_matmul_precision("highest"):
        exact = value_and_gradients("plain", *(x.astype(jnp.float32) for x in args))
    core = partial(value_and_gradients, "cudnn")
    if concepts:
        args = [x.reshape(concepts, 2, *x.shape[1:]) for x in args]
        core = jax.vmap(core)
    program = jax.jit(core).lower(*args).compile()
    assert program.as_text().count('custom_call_target="__cudnn$fmha') == 2
    for found, expected in zip(program(*args), exact, strict=True):
        assert_close(found.reshape(expected.shape), expected, 0.02)


def test_vae_attention_is_plain_instead_of_cudnn():
    """The VAE's one head is too wide for cuDNN."""
    query, key, value, _ = inputs(256, 256, 1, 512, dtype=jnp.bfloat16)
    attend = partial(attention, scale=512**-0.5)
    plain = attend(query, key, value)
    np.testing.assert_array_equal(attend(query, key, value, implementation="cudnn"), plain)


def config_of(dtype, monkeypatch):
    monkeypatch.setitem(architectures._ARCHITECTURES, "small", _SMALL)
    config = default()
    config.model.name, config.model.dtype = "random/small", dtype
    config.train.batch_size = 4
    add_concepts(config, GENDER)
    return config


def trained(config, steps):
    """RAM and SAM of both concepts, on the host."""
    setup = Setup.of(config)
    placement = Placement(config.parallel.strategy, len(setup.concepts), config.train.batch_size)
    step = placement.compile(partial(train_step, setup.spec))
    frozen = placement.replicate(setup.frozen)
    arrays = placement.place_concepts(setup.arrays)
    state = placement.place_state(setup.state)
    for _ in range(steps):
        state, _ = step(state, frozen, arrays)
    concepts = jax.device_get(state).concepts
    return concepts.ram, concepts.sam


def test_bfloat16_and_float32_train_similar_adapters(monkeypatch):
    """Weights, prompts and noise are the same; rounding and the attention differ.

    Adam's first steps follow the sign of the gradient, so elements with a tiny gradient differ at
    first.
    """
    with jax.default_matmul_precision("highest"):
        exact = trained(config_of("float32", monkeypatch), steps=30)
    found = trained(config_of("bfloat16", monkeypatch), steps=30)
    errors = [relative_error(*pair) for pair in zip(found, exact, strict=True)]
    print("relative difference of RAM, SAM:", *errors)
    assert max(errors) < 0.2


def test_bfloat16_and_float32_give_similar_pictures(monkeypatch):
    def pictures(dtype):
        config = config_of(dtype, monkeypatch)
        options = SamplerOptions(num_steps=10, guidance_scale=4.0, batch_size=2)
        sampler = Sampler(open_model(config), options)
        return np.asarray(sampler(sampler.prepare(["a person"] * 2, [0, 1]))[0], np.float32)

    exact, found = pictures("float32"), pictures("bfloat16")
    difference = np.abs(found - exact).mean()
    print("mean difference:", difference, "of 255; spread of the pictures:", exact.std())
    assert difference < 0.05 * exact.std()
