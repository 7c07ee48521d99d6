"""The attention kernels, interpreted on the CPU, against plain attention; and which modules use
them.

`pytest -m tpu_compile` compiles the TPU kernels with libtpu, without a TPU. `test_gpu.py` runs the
cuDNN kernel.
"""

import contextlib
import importlib
import importlib.util
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.models.attention_flax import FlaxBasicTransformerBlock
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, PartitionSpec

from respodiff_jax.backbone import attention as attention_lib
from respodiff_jax.backbone import backbone as backbone_lib
from respodiff_jax.backbone import load_backbone, random_backbone
from respodiff_jax.backbone.attention import attention, choose_attention
from respodiff_jax.backbone.flax_models import with_attention
from respodiff_jax.errors import UserError
from respodiff_jax.method.paper import GENDER
from respodiff_jax.training.config import add_concepts, default
from respodiff_jax.training.waves import train

P = PartitionSpec


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the TPU kernels on the CPU, for attentions of any size."""
    make = splash_attention.make_splash_mha_single_device
    monkeypatch.setattr(
        splash_attention, "make_splash_mha_single_device", partial(make, interpret=True)
    )
    monkeypatch.setattr(attention_lib, "_FUSED_FROM_SCORES", 0)


def inputs(tokens, keys, heads, head_dim, batch=1, dtype=jnp.float32):
    """Query, key, value and a cotangent; the scores are of the order of 4."""
    lengths = (tokens, keys, keys, tokens)
    return [
        2 * jax.random.normal(jax.random.key(i), (batch, length, heads, head_dim)).astype(dtype)
        for i, length in enumerate(lengths)
    ]


def value_and_gradients(implementation, query, key, value, cotangent):
    core = partial(attention, scale=query.shape[-1] ** -0.5, implementation=implementation)
    out, vjp = jax.vjp(core, query, key, value)
    return out, *vjp(cotangent)


def numpy_attention(query, key, value, scale):
    """Attention in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = scale * np.einsum("bthd,bshd->bhts", query, key)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights, value)


def assert_close(found, expected, tolerance):
    """Compares relative to the largest element."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_plain_attention_equals_numpy():
    query, key, value, _ = inputs(12, 7, 3, 8, batch=2)
    assert_close(attention(query, key, value, 0.3), numpy_attention(query, key, value, 0.3), 1e-6)


def test_softmax_is_float32_for_bfloat16_inputs():
    """In bfloat16, scores of 50 would be off by 0.1."""
    query, key, value, _ = inputs(16, 64, 1, 32, dtype=jnp.bfloat16)
    out = attention(query, key, value, 2.0)
    assert out.dtype == jnp.bfloat16
    assert_close(out, numpy_attention(query, key, value, 2.0), 0.01)


@pytest.mark.parametrize(
    ("tokens", "keys", "head_dim"),
    [(64, 64, 160), (256, 256, 80), (256, 77, 40), (1024, 1024, 64)],
)
def test_flash_equals_plain(tokens, keys, head_dim, interpreted):
    args = inputs(tokens, keys, heads=1 if tokens > 256 else 2, head_dim=head_dim, batch=2)
    found = jax.jit(partial(value_and_gradients, "flash"))(*args)
    expected = jax.jit(partial(value_and_gradients, "plain"))(*args)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize(("tokens", "keys"), [(96, 96), (64, 7)])
@pytest.mark.parametrize("chunk_scores", [1, 2500, 10**6])
def test_chunked_equals_plain(tokens, keys, chunk_scores, monkeypatch):
    """Forward and backward, for chunks of one query, of some, and of all."""
    monkeypatch.setattr(attention_lib, "_CHUNKED_FROM_SCORES", 0)
    monkeypatch.setattr(attention_lib, "_CHUNK_SCORES", chunk_scores)
    args = inputs(tokens, keys, heads=2, head_dim=8, batch=2)
    found = jax.jit(partial(value_and_gradients, "chunked"))(*args)
    expected = jax.jit(partial(value_and_gradients, "plain"))(*args)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_chunked_takes_little_memory_and_leaves_short_sequences_alone():
    def compiled(implementation, tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 32, 8), jnp.float32)
        return jax.jit(partial(value_and_gradients, implementation)).lower(x, x, x, x)

    assert compiled("chunked", 1024).as_text() == compiled("plain", 1024).as_text()
    scores = 32 * 4096**2 * 4
    plain, chunked = (
        compiled(implementation, 4096).compile().memory_analysis().temp_size_in_bytes
        for implementation in ("plain", "chunked")
    )
    assert plain >= scores > 6 * chunked


def test_flash_is_as_exact_as_plain_in_bfloat16(interpreted):
    args = inputs(256, 256, heads=2, head_dim=40, dtype=jnp.bfloat16)
    exact = value_and_gradients("plain", *(x.astype(jnp.float32) for x in args))
    for implementation in ("flash", "plain"):
        found = jax.jit(partial(value_and_gradients, implementation))(*args)
        for ours, theirs in zip(found, exact, strict=True):
            assert ours.dtype == jnp.bfloat16
            assert_close(ours, theirs, 0.02)


@pytest.mark.parametrize("tokens", [128, 640, 2304, 4096, 9216, 10880])
@pytest.mark.parametrize("row_bytes", [80, 128, 256, 1024, 2048])
def test_kernel_blocks_divide_their_axes(tokens, row_bytes):
    sizes = attention_lib._block_sizes(tokens, tokens, row_bytes)
    for block in (sizes.block_q, sizes.block_kv, sizes.block_q_dkv, sizes.block_kv_dkv):
        assert block % 128 == 0 and tokens % block == 0
    assert sizes.block_kv % sizes.block_kv_compute == 0 and sizes.block_kv_compute <= 512
    assert sizes.block_kv_dkv % sizes.block_kv_dkv_compute == 0
    assert sizes.block_kv * row_bytes <= 2**20


@pytest.mark.parametrize(
    ("implementation", "tokens", "keys", "head_dim", "is_fused"),
    [
        # SD 1.4 at 512 pixels: self-attention at three levels, cross-attention at two
        ("flash", 4096, 4096, 40, True),
        ("flash", 1024, 1024, 80, True),
        ("flash", 256, 256, 160, False),
        ("flash", 4096, 77, 40, True),
        ("flash", 1024, 77, 80, False),
        ("cudnn", 4096, 4096, 40, True),
        ("cudnn", 4096, 77, 40, True),
        ("cudnn", 4096, 4096, 512, True),  # the autoencoder, in chunks
        ("chunked", 4096, 4096, 40, True),
        ("chunked", 1024, 1024, 80, False),
        ("plain", 4096, 4096, 40, False),
    ],
)
def test_only_large_attentions_are_fused_or_chunked(
    implementation, tokens, keys, head_dim, is_fused, monkeypatch
):
    fused = []

    def core(query, key, value, scale):
        fused.append(scale)
        return query

    monkeypatch.setattr(attention_lib, "_flash", core)
    monkeypatch.setattr(attention_lib, "_cudnn", core)
    monkeypatch.setattr(attention_lib, "_chunked", core)
    query = jax.ShapeDtypeStruct((2, tokens, 8, head_dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, keys, 8, head_dim), jnp.bfloat16)
    attend = partial(attention, scale=0.125, implementation=implementation)
    out = jax.eval_shape(attend, query, key, key)
    assert (out.shape, out.dtype) == (query.shape, query.dtype)
    assert fused == [0.125] * is_fused


@pytest.mark.parametrize("keys", [4096, 77])
def test_training_with_cudnn_lowers_for_a_gpu(keys, monkeypatch):
    """Lowers values and gradients of two concepts without a GPU; JAX checks the shapes then."""
    checks = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(checks, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(checks, "check_compute_capability", lambda capability: True)
    query, key = (
        jax.ShapeDtypeStruct((2, 1, length, 8, 40), jnp.bfloat16) for length in (4096, keys)
    )
    step = jax.jit(jax.vmap(partial(value_and_gradients, "cudnn")))
    program = step.trace(query, key, key, query).lower(lowering_platforms=("cuda",))
    assert program.as_text().count("@__cudnn$fmha") == 2


def test_transformer_block_with_flash_equals_stock(interpreted):
    """Compares self- and cross-attention, and the gradient that trains the modules."""
    block = FlaxBasicTransformerBlock(dim=32, n_heads=2, d_head=16)
    x = jax.random.normal(jax.random.key(0), (2, 64, 32))
    context = jax.random.normal(jax.random.key(1), (2, 77, 24))
    params = jax.jit(block.init)(jax.random.key(2), x, context)

    def run(interceptors, params, x):
        with contextlib.ExitStack() as stack:
            for interceptor in interceptors:
                stack.enter_context(nn.intercept_methods(interceptor))
            out, vjp = jax.vjp(lambda x: block.apply(params, x, context), x)
            return out, *vjp(jnp.cos(out))

    expected = jax.jit(partial(run, []))(params, x)
    stock = jax.jit(partial(run, [with_attention("stock")]))(params, x)
    for theirs, same in zip(expected, stock, strict=True):
        np.testing.assert_array_equal(same, theirs)
    plain = jax.jit(partial(run, [with_attention("plain")]))(params, x)
    flash = jax.jit(partial(run, [with_attention("flash")]))(params, x)
    for theirs, same, ours in zip(expected, plain, flash, strict=True):
        assert_close(same, theirs, 1e-6)
        assert_close(ours, theirs, 1e-5)
        assert np.abs(ours - theirs).max() > 0  # rounded differently, so the kernel did run


@pytest.mark.parametrize("architecture", ["tiny", "tiny-xl"])
def test_every_attention_of_unet_and_vae_is_replaced(architecture, monkeypatch):
    lengths = []

    def core(query, key, value, scale):
        lengths.append((query.shape[1], key.shape[1]))
        return query

    monkeypatch.setattr(attention_lib, "_flash", core)
    monkeypatch.setattr(attention_lib, "_FUSED_FROM_SCORES", 0)
    backbone = random_backbone(architecture, attention="flash", abstract=True)
    backbone_lib._apply.clear_cache()  # both have the same VAE, which is traced once
    shape = jax.ShapeDtypeStruct
    z = shape((1, *backbone.latent_shape(16)), jnp.float32)
    cond = jax.eval_shape(lambda params: backbone.encode_prompts([""], 16, params), backbone.params)
    h, skips = jax.eval_shape(backbone.encode, backbone.params, z, shape((1,), jnp.int32), cond)
    encoder = len(lengths)
    jax.eval_shape(backbone.decode, backbone.params, h, skips)
    decoder = len(lengths) - encoder
    jax.eval_shape(backbone.decode_latents, backbone.params, z)
    modules = str(jax.tree_util.tree_structure(backbone.params["unet"])).count("'to_q'")
    assert encoder + decoder == modules > 4
    assert len(lengths) == modules + 1 and lengths[-1] == (64, 64)


def test_vae_equals_stock_vae(tiny_backbone):
    z = jax.random.normal(jax.random.key(1), (2, *tiny_backbone.latent_shape(16)))

    def stock(params, z):
        vae = tiny_backbone.vae
        z = jnp.moveaxis(z, -1, 1) / vae.config.scaling_factor
        image = vae.apply({"params": params["vae"]}, z, method=vae.decode).sample
        return jnp.clip(jnp.moveaxis(image, 1, -1) / 2 + 0.5, 0, 1)

    found = jax.jit(tiny_backbone.decode_latents)(tiny_backbone.params, z)
    expected = jax.jit(stock)(tiny_backbone.params, z)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_devices_attend_only_for_their_own_samples(interpreted):
    """On two concept × four data devices."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("concept", "data"))
    spec = P("concept", "data")
    args = [jnp.stack([x, 2 * x]) for x in inputs(128, 128, 1, 8, batch=4)]
    attend = jax.vmap(partial(value_and_gradients, "flash"))
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(mapped).lower(*args).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in compiled.as_text()
    found = jax.jit(mapped)(*args)
    expected = jax.vmap(partial(value_and_gradients, "plain"))(*args)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.sharding.spec == spec
        assert_close(ours, theirs, 1e-5)


def pretend(monkeypatch, backend, capability=""):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "chosen"),
    [
        ("cpu", "", jnp.bfloat16, "chunked"),
        ("tpu", "", jnp.bfloat16, "flash"),
        ("tpu", "", jnp.float32, "flash"),
        ("gpu", "9.0", jnp.bfloat16, "cudnn"),
        ("gpu", "10.0", jnp.bfloat16, "cudnn"),
        ("gpu", "9.0", jnp.float32, "chunked"),
        ("gpu", "7.5", jnp.bfloat16, "chunked"),
        ("gpu", "gfx90a", jnp.bfloat16, "chunked"),
    ],
)
def test_auto_chooses_the_fastest_attention(backend, capability, dtype, chosen, monkeypatch):
    pretend(monkeypatch, backend, capability)
    assert choose_attention("auto", jnp.dtype(dtype)) == chosen
    assert choose_attention(chosen, jnp.dtype(dtype)) == chosen


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (
            "flash",
            "`attention` is 'flash', which needs a TPU; this is cpu with bfloat16: use 'auto'",
        ),
        ("cudnn", "`attention` is 'cudnn', which needs bfloat16 and an NVIDIA GPU"),
        ("fast", "`attention` is 'fast', expected one of auto, plain, chunked, flash"),
    ],
)
def test_unavailable_attention_is_refused(attention, message):
    with pytest.raises(UserError, match=message):
        load_backbone("random/tiny", dtype="bfloat16", attention=attention, abstract=True)


def test_training_uses_the_attention_of_its_config(tmp_path):
    config = default()
    add_concepts(config, GENDER)
    config.model.name, config.model.attention = "random/tiny", "flash"
    config.train.batch_size = jax.device_count()
    with pytest.raises(UserError, match="`attention` is 'flash', which needs a TPU"):
        train(config, str(tmp_path))


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install -e ".[tpu]"',
)


@pytest.mark.tpu_compile
@needs_libtpu
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "dtype", "is_trained"),
    [
        (4, 4096, 8, 40, jnp.bfloat16, True),  # SD 1.4
        (1, 9216, 5, 64, jnp.bfloat16, True),  # SD 2.1 at 768 pixels
        (1, 576, 20, 64, jnp.bfloat16, True),
        (1, 4096, 10, 64, jnp.float32, True),  # SDXL
        (1, 16384, 1, 512, jnp.float32, False),  # its autoencoder
    ],
)
def test_flash_compiles_for_tpu(batch, tokens, heads, head_dim, dtype, is_trained, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    x = jax.ShapeDtypeStruct(
        (batch, tokens, heads, head_dim),
        dtype,
        sharding=jax.sharding.SingleDeviceSharding(device),
    )
    if is_trained:
        function, args = partial(value_and_gradients, "flash"), [x] * 4
    else:
        function, args = partial(attention, scale=0.1, implementation="flash"), [x] * 3
    compiled = jax.jit(function).lower(*args).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1 + is_trained
    scores = batch * heads * tokens**2 * x.dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 3
