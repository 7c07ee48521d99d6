"""Adapters in PyTorch equal Flax sampling, for every way to use a diffusers pipeline."""

import functools

import diffusers
import jax
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from test_adapters import MAN, VIOLENCE, WOMAN, make_adapter
from torch_pipelines import (
    PROMPTS,
    ROWS,
    SHAPE,
    assert_close,
    make_load,
    people,
    pipeline,
    torch_latents,
)

from respodiff_jax.adapters import combine, steerings
from respodiff_jax.backbone import load_backbone
from respodiff_jax.generation.sampling import denoise, initial_noise
from respodiff_jax.method.modules import KINDS
from respodiff_jax.method.schedule import Schedule

load = pytest.fixture(make_load)
# diffusers' schedulers give this warning with the newest releases of numpy and torch.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = ("a woman", "a man", "anti-violence")
# By default one model for each kind.
CASES = [("sd_folder", "constant"), ("sdxl_folder", "mlp")]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [
        ("sd_folder", "conv"),
        ("sd_folder", "mlp"),
        ("sdxl_folder", "constant"),
        ("sdxl_folder", "conv"),
        ("emoji_folder", "mlp"),
    ]
]


@functools.cache
def flax_sampler(folder, kind):
    """An adapter for the model, noise, and `sample(weights) -> z_0` with weights (4, 3): two images
    of each of PROMPTS, 50 DDIM steps."""
    backbone = load_backbone(folder)
    resolution = backbone.default_resolution
    schedule = Schedule.from_config(backbone.scheduler_config, 50)
    shape = backbone.mid_block_shape(resolution)
    adapter = people(kind, shape=shape, resolution=resolution)
    sample = jax.jit(
        functools.partial(denoise, backbone, tuple(part.module for part in adapter.parts), schedule)
    )
    cond = backbone.encode_prompts([prompt for prompt in PROMPTS for _ in range(2)], resolution)
    uncond = backbone.encode_prompts([""], resolution)
    noise = initial_noise(range(4), backbone.latent_shape(resolution))

    def run(weights):
        steering = steerings(adapter, np.float32(weights))
        return np.asarray(sample(backbone.params, noise, cond, uncond, steering, 7.5))

    return adapter, np.asarray(noise), run


def choices():
    """Functions that choose concepts of an adapter, and return the weights they stand for."""

    def single(adapter):
        adapter.set_concepts({"a woman": 1.0})
        return [[1, 0, 0]] * 4

    def composed(adapter):
        adapter.set_concepts({"a woman": 0.6, "a man": 0.4})
        return [[0.6, 0.4, 0]] * 4

    def fair(adapter):
        adapter.set_concepts({})
        picks = adapter.fair("gender", 2, 2)
        return [[name == pick for name in NAMES] for pick in picks]

    def safe(adapter):
        adapter.set_concepts({})
        adapter.safe()
        return [[0, 0, 1]] * 4

    def fair_and_safe(adapter):
        safe(adapter)
        picks = adapter.fair("gender", 2, 2)
        return [[name in (pick, NAMES[2]) for name in NAMES] for pick in picks]

    return single, composed, fair, safe, fair_and_safe


@pytest.mark.parametrize(("fixture", "kind"), CASES)
def test_50_steps_equal_flax_sampling_and_detach_restores_the_pipeline(
    fixture, kind, load, request
):
    folder = request.getfixturevalue(fixture)
    pipe = pipeline(folder)
    flax_adapter, noise, sample = flax_sampler(folder, kind)
    adapter = load(flax_adapter)
    base = torch_latents(pipe, noise=noise)
    short = functools.partial(torch_latents, pipe, noise=noise, steps=3)
    unsteered = short()
    adapter.attach(pipe)
    np.testing.assert_array_equal(short(), unsteered)  # nothing is chosen yet
    for choose in choices():
        theirs = sample(choose(adapter))
        ours = torch_latents(pipe, noise=noise)
        assert np.linalg.norm(ours - base) > 0.05 * np.linalg.norm(base), choose.__name__
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        print(f"{fixture} {kind} {choose.__name__}: relative difference {error:.1e}")
        assert error <= 1e-3, choose.__name__
    with adapter.disabled():
        np.testing.assert_array_equal(short(), unsteered)
    adapter.detach()
    np.testing.assert_array_equal(short(), unsteered)
    assert not pipe.unet.mid_block._forward_hooks


def explicit_hook(flax_adapter, weights, guided):
    """A hook that adds the Flax modules' deltas; the caller says whether there is guidance."""

    def hook(module, args, h):
        h_uncond, h_cond = h.chunk(2) if guided else (h[:0], h)
        h_nhwc = h_cond.permute(0, 2, 3, 1).numpy()
        delta = np.zeros_like(h_nhwc)
        for n in range(len(flax_adapter.concepts)):
            for params in (flax_adapter.ram, flax_adapter.sam):
                own = jax.tree.map(lambda leaf, n=n: leaf[n], params)
                weight = np.float32(weights)[:, n, None, None, None]
                delta += weight * np.asarray(flax_adapter.module.delta(own, h_nhwc))
        return torch.cat([h_uncond, h_cond + torch.tensor(delta).permute(0, 3, 1, 2)])

    return hook


def with_explicit_hook(pipe, hook, run):
    handle = pipe.unet.mid_block.register_forward_hook(hook)
    try:
        return run()
    finally:
        handle.remove()


WEIGHTS = [[1, 0, 0], [0, 0.5, 0], [0.3, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0, 0.0])
def test_each_image_gets_its_own_concepts_with_and_without_guidance(
    sd_folder, load, kind, guidance_scale
):
    pipe, flax_adapter = pipeline(sd_folder), people(kind)
    hook = explicit_hook(flax_adapter, WEIGHTS, guidance_scale > 1)

    def run():
        return torch_latents(pipe, steps=3, guidance_scale=guidance_scale)

    expected = with_explicit_hook(pipe, hook, run)
    base = run()
    adapter = load(flax_adapter).attach(pipe)
    adapter.set_concepts(ROWS)
    steered = run()
    adapter.detach()
    assert_close(steered, expected, 1e-5)
    np.testing.assert_array_equal(steered[3], base[3])
    assert (np.abs(steered - base).max(axis=(1, 2, 3))[:3] > 1e-2).all()


SCHEDULERS = (
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "DPMSolverMultistep",
    "PNDM",
    "HeunDiscrete",
)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(sd_folder, load, scheduler):
    pipe = diffusers.DiffusionPipeline.from_pretrained(sd_folder)
    scheduler_class = getattr(diffusers, f"{scheduler}Scheduler")
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)

    def run():
        return torch_latents(pipe, steps=4, generator=torch.Generator().manual_seed(3))

    flax_adapter = people()
    expected = with_explicit_hook(pipe, explicit_hook(flax_adapter, WEIGHTS, True), run)
    load(flax_adapter).attach(pipe).set_concepts(ROWS)
    assert_close(run(), expected, 1e-5)


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
@pytest.mark.parametrize("model", ["StableDiffusion", "StableDiffusionXL"])
def test_image_to_image_and_inpainting(model, task, guidance_scale, load, request):
    folder = request.getfixturevalue("sdxl_folder" if model.endswith("XL") else "sd_folder")
    pipe = getattr(diffusers, f"{model}{task}Pipeline").from_pipe(pipeline(folder))
    pipe.set_progress_bar_config(disable=True)
    image = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    images = image.repeat(1 if task == "Inpaint" else 4, 1, 1, 1)
    mask = (image[:, :1] > 0.1).float()
    options = {"mask_image": mask, "height": 16, "width": 16} if task == "Inpaint" else {}

    def run():
        return (
            pipe(
                PROMPTS,
                image=images,
                strength=0.8,
                num_images_per_prompt=2,
                num_inference_steps=5,
                guidance_scale=guidance_scale,
                generator=torch.Generator().manual_seed(3),
                output_type="latent",
                **options,
            )
            .images.float()
            .numpy()
        )

    base, flax_adapter = run(), people("mlp")
    hook = explicit_hook(flax_adapter, WEIGHTS, guidance_scale > 1)
    expected = with_explicit_hook(pipe, hook, run)
    adapter = load(flax_adapter).attach(pipe)
    adapter.set_concepts(ROWS)
    steered = run()
    adapter.detach()
    assert_close(steered, expected, 1e-5)
    assert np.linalg.norm(steered - base) > 1e-2 * np.linalg.norm(base)
    np.testing.assert_array_equal(run(), base)


def test_controlnet(sd_folder, load):
    parts = pipeline(sd_folder).components
    torch.manual_seed(0)
    controlnet = diffusers.ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(16, 16)
    )
    for convolution in (controlnet.controlnet_mid_block, *controlnet.controlnet_down_blocks):
        torch.nn.init.normal_(convolution.weight, std=0.1)  # initially zero
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    image = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16).repeat(2, 1, 1, 1)
    run = functools.partial(torch_latents, pipe, steps=3, image=image)
    flax_adapter = people("conv")
    base = run()
    expected = with_explicit_hook(pipe, explicit_hook(flax_adapter, WEIGHTS, True), run)
    adapter = load(flax_adapter).attach(pipe)
    adapter.set_concepts(ROWS)
    steered = run()
    adapter.detach()
    assert_close(steered, expected, 1e-5)
    assert np.linalg.norm(steered - base) > 1e-2 * np.linalg.norm(base)


@pytest.mark.parametrize("kinds", [("mlp", "conv"), ("constant", "constant")])
def test_adapters_of_any_kinds_add_up(sd_folder, load, kinds):
    """Each gets the same `h`, so the order does not matter, and equal kinds act as one adapter."""
    pipe = pipeline(sd_folder)
    flax = [
        make_adapter(kind, concepts, seed=seed, shape=SHAPE)
        for seed, (kind, concepts) in enumerate(
            zip(kinds, [(WOMAN, MAN), (VIOLENCE,)], strict=True)
        )
    ]

    def run(*adapters):
        for adapter in adapters:
            adapter.attach(pipe)
        latents = torch_latents(pipe, steps=3)
        for adapter in adapters:
            adapter.detach()
        return latents

    gender, safety = map(load, flax)
    gender.set_concepts([{"a woman": 1.0}, {"a man": 1.0}] * 2)
    safety.safe()
    together = run(gender, safety)
    assert_close(run(safety, gender), together, 1e-5)
    assert np.linalg.norm(run(gender) - together) > 1e-2 * np.linalg.norm(together)
    if kinds[0] == kinds[1]:
        one = load(combine(flax))
        one.set_concepts([{"a woman": 1.0}, {"a man": 1.0}] * 2)
        one.safe()
        assert_close(run(one), together, 1e-5)
    assert not pipe.unet.mid_block._forward_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_pipelines_add_in_float32(sd_folder, load, kind, dtype):
    pipe = diffusers.DiffusionPipeline.from_pretrained(sd_folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    adapter, flax_adapter = load(people(kind)), people(kind)
    adapter.set_concepts(ROWS)
    h = torch.randn(8, 64, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = explicit_hook(flax_adapter, WEIGHTS, True)(None, None, h.float()).to(dtype)
    adapter.attach(pipe)
    adapter._hook.steered = (False, True)
    hook = next(iter(pipe.unet.mid_block._forward_hooks.values()))
    steered = hook(None, (), {}, h)
    assert steered.dtype == dtype
    # The two sums may round differently, by one unit in the last place.
    torch.testing.assert_close(steered, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    latents = torch_latents(pipe, steps=2)
    assert np.isfinite(latents).all()
