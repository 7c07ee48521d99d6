"""Sampling against diffusers' PyTorch pipelines and numpy."""

import dataclasses
import functools
import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pipelines
import pytest
import safetensors.torch
import torch
from test_adapters import make_adapter, torch_delta

from respodiff_jax.adapters import save_adapter, select, steerings
from respodiff_jax.backbone import load_backbone, random_backbone
from respodiff_jax.errors import UserError
from respodiff_jax.generation import sampling
from respodiff_jax.generation.sampling import SamplerOptions, denoise, initial_noise
from respodiff_jax.method.modules import KINDS
from respodiff_jax.method.schedule import Schedule

PROMPTS = ["a person", "two women on a boat"]
MID_BLOCK = (4, 4, 64)


@pytest.fixture(scope="module")
def backbone():
    return random_backbone("tiny")


def tiny_adapter(backbone, kind="constant", **changes):
    own = dict(backbone.identity) | {"resolution": 16}
    return make_adapter(kind, shape=MID_BLOCK, **own, **changes)


def jitted_denoise(backbone, *modules, num_steps=3):
    schedule = Schedule.from_config(backbone.scheduler_config, num_steps)
    return jax.jit(functools.partial(denoise, backbone, modules, schedule))


def arguments(backbone, seeds=(0, 1), prompts=PROMPTS):
    """params, noise, cond and uncond for one image per seed."""
    noise = initial_noise(seeds, backbone.latent_shape(16))
    cond = backbone.encode_prompts(prompts, 16)
    return backbone.params, noise, cond, backbone.encode_prompts([""], 16)


@pytest.mark.parametrize("fixture", ["sd_folder", "sd_v_folder", "sdxl_folder"])
def test_50_guided_ddim_steps_equal_diffusers(fixture, request):
    folder = request.getfixturevalue(fixture)
    backbone = load_backbone(folder)
    args = arguments(backbone)
    latents = jitted_denoise(backbone, num_steps=50)(*args, (), 7.5)
    images = jax.jit(backbone.decode_latents)(backbone.params, latents)
    theirs = torch_latents(folder, args[1], 50)
    assert np.abs(theirs).max() > 3  # untrained models end anywhere in -60 .. 60
    np.testing.assert_allclose(latents, theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(images, torch_images(folder, theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_sampling_equals_diffusers_with_a_hook(kind, sd_folder, tmp_path):
    backbone = load_backbone(sd_folder)
    adapter = tiny_adapter(backbone, kind)
    save_adapter(adapter, tmp_path)
    weights = np.float32([[1.0, 0.0], [0.6, 0.4]])
    args = arguments(backbone)
    sample = jitted_denoise(backbone, adapter.module, num_steps=8)
    ours = sample(*args, steerings(adapter, weights), 7.5)

    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")

    def hook(module, inputs, h):
        h_uncond, h_cond = h.chunk(2)  # diffusers' order
        delta = torch.zeros_like(h_cond)
        for i in range(2):
            for role in ("ram", "sam"):
                prefix = f"concepts.{i}.{role}."
                own = {
                    k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
                }
                delta += torch.from_numpy(weights[:, i, None, None, None]) * torch_delta(
                    own, h_cond
                )
        return torch.cat([h_uncond, h_cond + delta])

    theirs = torch_latents(sd_folder, args[1], 8, hook)
    base = torch_latents(sd_folder, args[1], 8)
    scale = np.abs(theirs).max()
    assert np.abs(theirs - base).max() > 0.1 * scale
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale)


def torch_pipeline(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def torch_latents(folder, noise, num_steps, hook=None):
    pipeline = torch_pipeline(folder)
    if hook is not None:
        pipeline.unet.mid_block.register_forward_hook(hook)
    return pipelines.torch_latents(pipeline, PROMPTS, noise, num_steps, 7.5)


def torch_images(folder, latents):
    pipeline = torch_pipeline(folder)
    latents = torch.from_numpy(latents).permute(0, 3, 1, 2)
    images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()


def test_one_step_equals_numpy(backbone):
    """In numpy: only the conditional half is steered, then CFG and DDIM."""
    encode, decode = jax.jit(backbone.encode), jax.jit(backbone.decode)
    adapter = tiny_adapter(backbone)
    weights = np.float32([[1.0, 0.0], [0.25, 2.0]])
    params, noise, cond, uncond = arguments(backbone)
    (steering,) = steerings(adapter, weights)
    ours = jitted_denoise(backbone, adapter.module, num_steps=1)(
        params, noise, cond, uncond, (steering._replace(sam_scale=0.5 * weights),), 3.0
    )
    timesteps = jnp.array([1, 1])  # one leading step with steps_offset 1
    h, skips = encode(params, noise, timesteps, cond)
    ram, sam = adapter.ram["constant"], adapter.sam["constant"]
    delta = np.einsum("bn,nhwc->bhwc", weights, ram + 0.5 * sam)
    eps_cond = np.asarray(decode(params, np.asarray(h) + delta, skips))
    both_uncond = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), uncond)
    eps_uncond = np.asarray(decode(params, *encode(params, noise, timesteps, both_uncond)))
    eps = eps_uncond + 3.0 * (eps_cond - eps_uncond)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar, alpha_bar_next = np.cumprod(1 - betas)[[1, 0]]
    z_0 = (np.asarray(noise) - np.sqrt(1 - alpha_bar) * eps) / np.sqrt(alpha_bar)
    expected = np.sqrt(alpha_bar_next) * z_0 + np.sqrt(1 - alpha_bar_next) * eps
    np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_adapter_gives_the_base_model_bit_for_bit(backbone, kind):
    args = arguments(backbone)
    base = jitted_denoise(backbone)(*args, (), 7.5)
    adapter = tiny_adapter(backbone, kind)
    sample = jitted_denoise(backbone, adapter.module)
    zero_weights = sample(*args, steerings(adapter, np.zeros((2, 2))), 7.5)
    np.testing.assert_array_equal(zero_weights, base)
    untrained = jax.vmap(adapter.module.init_params)(jax.random.split(jax.random.key(0), 2))
    (steering,) = steerings(adapter, np.ones((2, 2)))
    steering = steering._replace(ram=untrained, sam=untrained)
    np.testing.assert_array_equal(sample(*args, (steering,), 7.5), base)
    assert np.abs(sample(*args, steerings(adapter, np.ones((2, 2))), 7.5) - base).max() > 1e-3


def test_image_does_not_depend_on_its_batch(backbone):
    adapter = tiny_adapter(backbone)
    weights = np.float32([[1, 0], [0, 1], [0.6, 0.4], [0, 0]])
    seeds, prompts = (5, 6, 7, 8), ["a person", "a man", "a boat", ""]
    sample = jitted_denoise(backbone, adapter.module)
    args = arguments(backbone, seeds, prompts)
    together = sample(*args, steerings(adapter, weights), 7.5)
    np.testing.assert_array_equal(args[1][2], initial_noise([7], backbone.latent_shape(16))[0])
    for i in range(4):
        alone = sample(
            *arguments(backbone, seeds[i : i + 1], prompts[i : i + 1]),
            steerings(adapter, weights[i : i + 1]),
            7.5,
        )
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5 * np.abs(together).max())
    # All four are different images.
    assert min(np.abs(together[0] - together[i]).max() for i in (1, 2, 3)) > 0.1


def test_noise_of_an_image_depends_only_on_its_seed():
    noise = initial_noise([3, 2**32 - 1], (2, 3, 4))
    np.testing.assert_array_equal(noise[0], jax.random.normal(jax.random.key(3), (2, 3, 4)))
    assert noise.dtype == jnp.float32
    with pytest.raises(UserError, match=r"seeds are -1 .. 4, expected within 0 .. 4294967295"):
        initial_noise([4, -1], (2, 3, 4))


def test_other_guidance_and_adapters_compile_nothing(backbone):
    sample = jitted_denoise(backbone, tiny_adapter(backbone).module)
    args = arguments(backbone)
    outputs = [
        sample(*args, steerings(tiny_adapter(backbone, seed=seed), weights), guidance)
        for seed, weights, guidance in (
            (0, np.eye(2), 7.5),
            (1, np.eye(2), 7.5),
            (1, np.ones((2, 2)), 7.5),
            (1, np.ones((2, 2)), 1.0),
        )
    ]
    assert sample._cache_size() == 1
    for a, b in itertools.pairwise(outputs):
        assert np.abs(a - b).max() > 1e-3
    # As in diffusers: at 1 and below, the negative prompt has no effect.
    low = sample(*args, steerings(tiny_adapter(backbone, seed=1), np.ones((2, 2))), 0.3)
    np.testing.assert_array_equal(low, outputs[-1])
    other_uncond = (*args[:3], backbone.encode_prompts(["a boat"], 16))
    steering = steerings(tiny_adapter(backbone, seed=1), np.ones((2, 2)))
    np.testing.assert_allclose(sample(*other_uncond, steering, 1.0), low, atol=2e-5)


def test_devices_sample_without_exchanging_data(backbone):
    adapter = tiny_adapter(backbone)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
    split, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (["data"], [])
    )
    params, noise, cond, uncond = arguments(backbone, range(8), ["a person"] * 8)
    params, uncond = jax.device_put((params, uncond), whole)
    noise, cond = jax.device_put((noise, cond), split)
    (steering,) = steerings(adapter, np.ones((8, 2)))
    steering = steering._replace(
        ram=jax.device_put(steering.ram, whole),
        sam=jax.device_put(steering.sam, whole),
        ram_scale=jax.device_put(steering.ram_scale, split),
        sam_scale=jax.device_put(steering.sam_scale, split),
    )
    sampler = sampling.make_sampler(backbone, (adapter.module,), 2, mesh)
    args = (params, noise, cond, uncond, (steering,), 7.5)
    compiled = sampler.lower(*args).compile()
    program = compiled.as_text()
    assert "fusion" in program or "convolution" in program
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program
    images, is_finite = compiled(*args)
    assert images.shape == (8, 16, 16, 3) and images.dtype == jnp.uint8
    assert is_finite.tolist() == [True] * 8


def test_sampling_compiles_once_for_all_lengths_and_adapters(backbone, monkeypatch):
    traces = []

    def counted(backbone, modules, schedule, params, noise, *args):
        traces.append(noise.shape)
        return denoise(backbone, modules, schedule, params, noise, *args)

    monkeypatch.setattr(sampling, "denoise", counted)
    backbone = dataclasses.replace(backbone)  # a copy without compiled programs
    adapter = tiny_adapter(backbone)
    other = dataclasses.replace(adapter, ram=jax.tree.map(lambda x: x + 1, adapter.ram))
    pairs, others, weaker = (
        list(
            sampling.sample_images(
                backbone,
                ["a person"] * 20,
                range(20),
                SamplerOptions(num_steps=1, guidance_scale=guidance_scale, batch_size=8),
                chosen,
                np.ones((20, 2)),
                base_twins=True,
            )
        )
        for chosen, guidance_scale in ((adapter, 7.5), (other, 7.5), (adapter, 3.0))
    )
    assert len(pairs) == 20
    for changed in (others, weaker):
        assert not np.array_equal(pairs[0].image, changed[0].image)
    sampler = sampling.Sampler(backbone, SamplerOptions(num_steps=1), adapter)
    images, _ = sampler(sampler.prepare(["a person"] * 8, range(8)), np.ones((8, 2)))
    assert [len(shard.data) for shard in images.addressable_shards] == [1] * 8  # on all devices
    assert traces == [(1, 8, 8, 4)]  # one image on each of the eight devices
    assert pairs[0].image.shape == (16, 16, 3) and pairs[0].image.dtype == np.uint8


def test_concepts_that_steer_no_image_are_left_out(backbone, monkeypatch):
    adapter, options = tiny_adapter(backbone), SamplerOptions(num_steps=1, batch_size=8)
    sizes, sampler = [], sampling.Sampler

    def counted(backbone, options, adapter, encode):
        sizes.append(len(adapter.concepts))
        return sampler(backbone, options, adapter, encode)

    monkeypatch.setattr(sampling, "Sampler", counted)

    def sampled(adapter, weights):
        args = (backbone, ["a person"] * 2, [0, 1], options, adapter, weights, True)
        return list(sampling.sample_images(*args))

    second = select(adapter, adapter.names[1:])
    for weights, expected in (
        (np.array([[0, 2], [0, 1]]), sampled(second, np.array([[2], [1]]))),
        (np.zeros((2, 2)), sampled(second, np.zeros((2, 1)))),
    ):
        for ours, theirs in zip(sampled(adapter, weights), expected, strict=True):
            np.testing.assert_array_equal(ours.image, theirs.image)
            np.testing.assert_array_equal(ours.base, theirs.base)
    assert sizes == [1] * 4


def test_a_batch_that_nothing_steers_is_its_own_base(backbone, monkeypatch):
    adapter, options = tiny_adapter(backbone), SamplerOptions(num_steps=1, batch_size=8)
    args = backbone, ["a person"] * 16, range(16), options, adapter
    weights = np.repeat([[1.0, 0.0], [0.0, 0.0]], 8, axis=0)
    calls, call = [], sampling.Sampler.__call__
    monkeypatch.setattr(
        sampling.Sampler, "__call__", lambda *args: calls.append(args[2]) or call(*args)
    )
    pairs = list(sampling.sample_images(*args, weights, base_twins=True))
    assert len(calls) == 3
    plain = sampling.sample_images(*args, 0 * weights)
    for i, (pair, base) in enumerate(zip(pairs, plain, strict=True)):
        np.testing.assert_array_equal(pair.base, base.image)
        assert np.array_equal(pair.image, base.image) == (i >= 8)


def test_wrong_options_are_refused():
    with pytest.raises(UserError, match="batch size is 6, expected a multiple of the 8 devices"):
        SamplerOptions(batch_size=6)
    with pytest.raises(UserError, match="number of sampling steps is 0"):
        SamplerOptions(num_steps=0)
    with pytest.raises(UserError, match="guidance scale is nan"):
        SamplerOptions(guidance_scale=float("nan"))
    with pytest.raises(UserError, match="resolution is -8"):
        SamplerOptions(resolution=-8)
