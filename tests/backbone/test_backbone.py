"""The frozen model equals PyTorch's pipelines and the stock Flax UNet."""

import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from respodiff_jax.backbone import (
    Conditioning,
    load_backbone,
    random_backbone,
    save_backbone,
)
from respodiff_jax.backbone.flax_models import match_pytorch, upsample_in_phases
from respodiff_jax.errors import UserError
from respodiff_jax.method.diffusion import concatenate, split

PROMPTS = ["a woman", "a person", "the man, 35", ""]
FOLDERS = ["sd_folder", "sd_v_folder", "sdxl_folder"]


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request):
    """The same model in JAX and in PyTorch."""
    folder = request.getfixturevalue(request.param)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return load_backbone(folder), pipeline


def _nchw(x):
    return torch.from_numpy(np.array(jnp.moveaxis(x, -1, 1)))


def _nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def _inputs(backbone):
    z = jax.random.normal(jax.random.key(0), (2, *backbone.latent_shape(16)))
    return z, jnp.array([981, 3]), backbone.encode_prompts(PROMPTS[:2], 16)


def _pytorch(pipeline, z, timesteps, cond):
    added = None
    if cond.pooled is not None:
        added = {
            "text_embeds": torch.from_numpy(np.array(cond.pooled)),
            "time_ids": torch.from_numpy(np.array(cond.time_ids)),
        }
    context = torch.from_numpy(np.array(cond.context))
    timesteps = torch.from_numpy(np.array(timesteps))
    with torch.no_grad():
        out = pipeline.unet(_nchw(z), timesteps, context, added_cond_kwargs=added)
    return _nhwc(out.sample)


def _uncut(backbone, params, z, timesteps, cond):
    added = None
    if cond.pooled is not None:
        added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}

    def apply(params, z):
        z_nchw = jnp.moveaxis(z, -1, 1)
        with nn.intercept_methods(match_pytorch), nn.intercept_methods(upsample_in_phases):
            out = backbone.unet.apply({"params": params}, z_nchw, timesteps, cond.context, added)
        return jnp.moveaxis(out.sample, 1, -1)

    return jax.jit(apply)(params["unet"], z)


def test_encode_and_decode_equal_pytorch(pair):
    backbone, pipeline = pair
    inputs = _inputs(backbone)
    h, skips = jax.jit(backbone.encode)(backbone.params, *inputs)
    eps = jax.jit(backbone.decode)(backbone.params, h, skips)
    delta = jax.random.normal(jax.random.key(1), h.shape)
    steered = jax.jit(backbone.decode)(backbone.params, h + delta, skips)
    assert h.shape == (2, *backbone.mid_block_shape(16)) == (2, 4, 4, 64)
    assert eps.dtype == jnp.float32

    seen = {}

    def add(module, args, output):
        seen["h"] = output
        return output + seen["delta"]

    hook = pipeline.unet.mid_block.register_forward_hook(add)
    seen["delta"] = 0
    expected = _pytorch(pipeline, *inputs)
    seen["delta"] = _nchw(delta)
    expected_steered = _pytorch(pipeline, *inputs)
    hook.remove()
    assert 0.1 < np.std(expected) < 10
    assert np.abs(expected_steered - expected).max() > 0.02
    np.testing.assert_allclose(h, _nhwc(seen["h"]), atol=5e-5, rtol=0)  # of the order of 10
    np.testing.assert_allclose(eps, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(steered, expected_steered, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pair", ["sd_folder", "sdxl_folder"], indirect=True)
@pytest.mark.slow  # the short compilation of the other tests changes the last bits
def test_encode_then_decode_equals_the_uncut_unet_bit_for_bit(pair):
    backbone, _ = pair
    inputs = _inputs(backbone)
    h, skips = jax.jit(backbone.encode)(backbone.params, *inputs)
    eps = jax.jit(backbone.decode)(backbone.params, h, skips)
    np.testing.assert_array_equal(eps, _uncut(backbone, backbone.params, *inputs))


# Emoji World's blocks before the mid-block read no prompt; those of the others do.
@pytest.mark.parametrize("name", ["emoji-world", "tiny", "tiny-xl"])
def test_several_prompts_of_a_latent_equal_copies_of_it(name):
    emoji = name == "emoji-world"
    model = load_backbone(name, dtype="float32") if emoji else random_backbone(name)
    resolution = model.default_resolution
    z_t = jax.random.normal(jax.random.key(0), (2, *model.latent_shape(resolution)))
    timesteps = jnp.array([981, 3])
    first, second = (
        model.encode_prompts([f"a photo of a {word}"] * 2, resolution) for word in ("cook", "judge")
    )
    cond = concatenate(first, second)

    def shared(z_t, timesteps):
        return model.encode(model.params, z_t, timesteps, cond)

    def copied(z_t, timesteps):
        copies = concatenate(z_t, z_t), concatenate(timesteps, timesteps)
        return model.encode(model.params, *copies, cond)

    ours, theirs = (jax.jit(f)(z_t, timesteps) for f in (shared, copied))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5, rtol=0), ours, theirs)
    h_first, h_second = split(ours[0], 2)
    assert np.abs(h_first - h_second).max() > 1e-3
    flops, flops_of_copies = (
        jax.jit(f).lower(z_t, timesteps).cost_analysis()["flops"] for f in (shared, copied)
    )
    assert (flops < 0.9 * flops_of_copies) if emoji else (flops == flops_of_copies)


def test_programs_share_the_trace_of_the_unet(tiny_backbone):
    """Tracing the UNet takes longer than tracing everything else of a program."""
    called, params = [], tiny_backbone.params

    def count(next_function, args, kwargs, context):
        called.append(context.method_name)
        return next_function(*args, **kwargs)

    def trace():
        called.clear()
        batch = 7  # which no other test has
        args = jax.tree.map(lambda x: jnp.repeat(x[:1], batch, axis=0), _inputs(tiny_backbone))
        with nn.intercept_methods(count):
            jaxpr = jax.make_jaxpr(lambda *args: tiny_backbone.encode(params, *args))(*args)
        return len(called), str(jaxpr)

    (first, ours), (second, theirs) = trace(), trace()
    assert first > 0 == second and ours == theirs


def test_gradient_has_no_scatter(tiny_backbone):
    """The gradient of the stock upsampling is a scatter, position by position."""
    h, skips = jax.jit(tiny_backbone.encode)(tiny_backbone.params, *_inputs(tiny_backbone))

    def loss(h):
        return jnp.mean(tiny_backbone.decode(tiny_backbone.params, h, skips) ** 2)

    lowered = jax.jit(jax.grad(loss)).lower(h).as_text()
    assert "stablehlo.convolution" in lowered and "stablehlo.scatter" not in lowered


@pytest.mark.parametrize("pair", ["sdxl_folder"], indirect=True)
def test_bfloat16_is_close_to_float32(pair):
    exact = pair[0]
    rounded = load_backbone(exact.identity["name"], dtype="bfloat16")
    z, timesteps, cond = _inputs(rounded)
    assert {x.dtype.name for x in jax.tree.leaves(rounded.params)} == {"bfloat16"}
    assert cond.context.dtype == cond.pooled.dtype == jnp.bfloat16
    assert cond.time_ids.dtype == jnp.float32
    h, skips = jax.jit(rounded.encode)(rounded.params, z, timesteps, cond)
    assert {x.dtype.name for x in jax.tree.leaves((h, skips))} == {"bfloat16"}
    # Deltas are added in fp32, so h is fp32.
    eps = jax.jit(rounded.decode)(rounded.params, h.astype(jnp.float32), skips)
    assert eps.dtype == jnp.float32

    h, skips = jax.jit(exact.encode)(exact.params, *_inputs(exact))
    expected = jax.jit(exact.decode)(exact.params, h, skips)
    assert 0 < np.abs(eps - expected).max() < 0.05 * np.abs(expected).max()


def test_bfloat16_model_computes_norms_and_softmax_in_float32():
    backbone = random_backbone("tiny", dtype="bfloat16", abstract=True)
    shape = jax.ShapeDtypeStruct

    def predict(params, z_t, timesteps, context):
        h, skips = backbone.encode(params, z_t, timesteps, Conditioning(context))
        return backbone.decode(params, h, skips)

    inputs = (
        shape((2, 8, 8, 4), jnp.float32),
        shape((2,), jnp.int32),
        shape((2, 77, 32), jnp.bfloat16),
    )
    text = jax.jit(predict).lower(backbone.params, *inputs).as_text()
    for op, dtype in {
        "reduce": "f32",  # means and variances, maximum and sum of the softmax
        "rsqrt": "f32",
        "convolution": "bf16",
        "dot_general": "bf16",
    }.items():
        lines = re.findall(rf"stablehlo\.{op}[( ].*", text)
        assert {re.search(r"x(bf16|f32)>", line)[1] for line in lines} == {dtype}, op


def test_encoded_prompts_equal_pytorch(pair):
    backbone, pipeline = pair
    cond = backbone.encode_prompts(PROMPTS, 16)
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    context = encoded[0].numpy().copy()
    assert np.std(context) > 0.1
    if len(backbone.text_encoders) == 1:
        assert cond.pooled is None and cond.time_ids is None
    else:
        pooled = encoded[2].numpy().copy()
        context[3], pooled[3] = 0, 0  # the empty prompt, see the test below
        np.testing.assert_allclose(cond.pooled, pooled, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(cond.time_ids, [[16, 16, 0, 0, 16, 16]] * 4)
    assert cond.context.shape == context.shape
    np.testing.assert_allclose(cond.context, context, atol=1e-4, rtol=0)


def test_empty_sdxl_prompt_equals_no_negative_prompt(sdxl_folder, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(sdxl_folder)
    with torch.no_grad():
        _, negative, _, negative_pooled = pipeline.encode_prompt("a man", device="cpu")
    cond = load_backbone(sdxl_folder).encode_prompts([""], 16)
    np.testing.assert_array_equal(cond.context, negative)
    np.testing.assert_array_equal(cond.pooled, negative_pooled)

    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    index = folder / "model_index.json"
    changed = json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}
    index.write_text(json.dumps(changed))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        _, negative, _, negative_pooled = pipeline.encode_prompt("a man", device="cpu")
    cond = load_backbone(folder).encode_prompts([""], 16)
    assert np.std(negative.numpy()) > 0.1
    np.testing.assert_allclose(cond.context, negative, atol=1e-4, rtol=0)
    np.testing.assert_allclose(cond.pooled, negative_pooled, atol=1e-4, rtol=0)


def test_decoded_images_equal_pytorch(pair):
    backbone, pipeline = pair
    z = 0.3 * jax.random.normal(jax.random.key(3), (2, *backbone.latent_shape(16)))
    with torch.no_grad():
        decoded = pipeline.vae.decode(_nchw(z) / pipeline.vae.config.scaling_factor).sample
        expected = pipeline.image_processor.postprocess(decoded, output_type="np")
    images = jax.jit(backbone.decode_latents)(backbone.params, z)
    assert images.shape == (2, 16, 16, 3) and images.dtype == jnp.float32
    assert np.mean((expected > 0) & (expected < 1)) > 0.3
    np.testing.assert_allclose(images, expected, atol=1e-4, rtol=0)


def test_too_long_prompt_warns_with_the_lost_text(sd_folder):
    backbone = load_backbone(sd_folder)
    prompt = "woman " * 14 + "man person"
    with pytest.warns(UserWarning, match=r"has 18 tokens, .* reads 16; not read: 'man person ?'"):
        long = backbone.encode_prompts([prompt], 16)
    short = backbone.encode_prompts(["woman " * 14], 16)
    np.testing.assert_array_equal(long.context, short.context)


@pytest.mark.parametrize("prompts", ["a man", [], [None], ["a man", 3]])
def test_prompts_must_be_strings(prompts):
    with pytest.raises(UserError, match="non-empty sequence of strings"):
        random_backbone("tiny").encode_prompts(prompts, 16)


@pytest.mark.parametrize(
    ("architecture", "resolution", "latent", "mid_block", "unet_params"),
    [
        ("sd14", 512, (64, 64, 4), (8, 8, 1280), 859_520_964),
        ("sd21", 768, (96, 96, 4), (12, 12, 1280), 865_910_724),
        pytest.param(
            *("sdxl", 1024, (128, 128, 4), (32, 32, 1280), 2_567_463_684), marks=pytest.mark.slow
        ),
    ],
)
def test_published_architectures(architecture, resolution, latent, mid_block, unet_params):
    backbone = random_backbone(architecture, dtype="bfloat16", abstract=True)
    assert backbone.default_resolution == resolution
    assert backbone.latent_shape(resolution) == latent
    assert backbone.mid_block_shape(resolution) == mid_block
    assert sum(x.size for x in jax.tree.leaves(backbone.params["unet"])) == unet_params

    shape = jax.ShapeDtypeStruct
    cond = Conditioning(shape((2, 77, backbone.unet.cross_attention_dim), jnp.bfloat16))
    if architecture == "sdxl":
        cond = cond._replace(
            pooled=shape((2, 1280), jnp.bfloat16), time_ids=shape((2, 6), jnp.float32)
        )
    z = shape((2, *latent), jnp.float32)
    h, skips = jax.eval_shape(backbone.encode, backbone.params, z, shape((2,), jnp.int32), cond)
    assert h.shape == (2, *mid_block)
    eps = jax.eval_shape(backbone.decode, backbone.params, h, skips)
    assert eps.shape == z.shape and eps.dtype == jnp.float32


def test_random_weights_depend_only_on_the_seed():
    a, b, c = (random_backbone("tiny", seed=seed) for seed in (1, 1, 2))
    assert a.identity["name"] == "random/tiny" and a.identity["revision"] == "seed-1"
    assert a.identity == b.identity
    assert a.identity["unet_sha256"] != c.identity["unet_sha256"]
    kernel = ("unet", "conv_in", "kernel")
    (x, y, z) = (_at(backbone.params, kernel) for backbone in (a, b, c))
    np.testing.assert_array_equal(x, y)
    assert np.abs(x - z).max() > 0.1
    assert np.std(x) == pytest.approx((9 * 4) ** -0.5, rel=0.1)
    loaded = load_backbone(a.identity["name"], revision=a.identity["revision"])
    assert loaded.identity == a.identity
    assert random_backbone("tiny-v").scheduler_config["prediction_type"] == "v_prediction"


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("architecture", ["tiny", "tiny-xl"])
def test_saved_backbone_loads_here_and_in_pytorch(architecture, tmp_path):
    backbone = random_backbone(architecture, seed=3)
    save_backbone(backbone, tmp_path)
    loaded = load_backbone(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, backbone.params)
    assert loaded.scheduler_config == backbone.scheduler_config
    assert loaded.zeros_for_empty_prompt == backbone.zeros_for_empty_prompt

    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            ["a nurse"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    cond = backbone.encode_prompts(["a nurse"], 16)
    np.testing.assert_allclose(cond.context, encoded[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("resolution", "nearest"), [(18, "16 or 20"), (3, "is 4 "), (0, "is 4 "), (-8, "is 4 ")]
)
def test_invalid_resolution_names_the_nearest_valid_ones(resolution, nearest):
    backbone = random_backbone("tiny", abstract=True)
    with pytest.raises(UserError, match=rf"multiple of 4 pixels.*{nearest}"):
        backbone.latent_shape(resolution)
    with pytest.raises(UserError, match=nearest):
        backbone.encode_prompts(["a man"], resolution)


def test_wrong_input_shapes_are_named():
    backbone = random_backbone("tiny-xl", abstract=True)
    shape = jax.ShapeDtypeStruct
    good = {
        "z": shape((2, 8, 8, 4), jnp.float32),
        "t": shape((2,), jnp.int32),
        "context": shape((2, 77, 64), jnp.float32),
        "pooled": shape((2, 32), jnp.float32),
        "time_ids": shape((2, 6), jnp.float32),
    }

    def encode(**changes):
        x = good | changes
        cond = Conditioning(x["context"], x["pooled"], x["time_ids"])
        return jax.eval_shape(backbone.encode, backbone.params, x["z"], x["t"], cond)

    assert encode()[0].shape == (2, 4, 4, 64)
    for name, bad, message in [
        ("z", (2, 4, 8, 8), "`z_t` has shape .2, 4, 8, 8., expected .B, h, w, 4., channels last"),
        ("t", (1,), "`timesteps` has shape .1,., expected .2. for 2 latents"),
        ("t", (), "`timesteps` has shape"),
        ("context", (77, 64), "`cond.context` has shape"),
        ("context", (1, 77, 64), "`cond.context` has shape"),
        ("context", (3, 77, 64), "expected .2, ., .. for 2 latents and 1 prompt"),
        ("context", (4, 77, 64), "`cond.pooled` has shape .2, 32., expected .4, .. for 2 latents"),
        ("z", (0, 8, 8, 4), "`z_t` has shape .0, 8, 8, 4., expected .B"),
        ("pooled", (3, 32), "`cond.pooled` has shape"),
        ("time_ids", (2, 5), "`cond.time_ids` has shape .2, 5., expected .2, 6."),
    ]:
        with pytest.raises(UserError, match=message):
            encode(**{name: shape(bad, jnp.float32)})
    with pytest.raises(UserError, match=r"SDXL needs `cond.pooled`"):
        encode(pooled=None)
