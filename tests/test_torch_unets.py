"""The PyTorch adapter on compiled, replaced, copied and shared UNets, and in Modular Diffusers.

Nothing here needs JAX: `launch/newest_torch.sh` runs this file with the newest diffusers.
"""

import copy
import importlib
import io
import time

import diffusers
import pytest
import torch
import torch_adapters
from torch_calls import (
    GUIDED,
    PROMPTS,
    UNCOND,
    UNGUIDED,
    check,
    draw,
    fresh,
    generator,
    make_adapter,
    make_models,
    noise,
    quiet,
    recorded,
    run_own_loop,
    separate,
    states,
)

from respodiff_jax import torch_adapter

models = pytest.fixture(make_models, scope="module")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def compile_forward(pipe, **options):
    pipe.unet.forward = torch.compile(pipe.unet.forward, **options)


def compile_pipe_unet(pipe, **options):
    pipe.unet = torch.compile(pipe.unet, **options)


def compile_in_place(pipe, **options):
    pipe.unet.compile(**options)


def compile_mid_block(pipe, **options):
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, **options)


def compile_mid_block_in_place(pipe, **options):
    pipe.unet.mid_block.compile(**options)


COMPILE = (
    compile_forward,
    compile_pipe_unet,
    compile_in_place,
    compile_mid_block,
    compile_mid_block_in_place,
)


def test_unet_compiled_and_run_before_attaching(models):
    pipe = torch_adapters.with_small_unet(fresh(models["sd"]))
    adapter = make_adapter(8).attach(pipe)
    eager = draw(pipe, steps=1)
    adapter.detach()
    compile_forward(pipe, backend="eager")
    plain = draw(pipe, steps=1)
    adapter.attach(pipe)
    assert torch.allclose(draw(pipe, steps=1), eager, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain, eager, rtol=1e-3)
    adapter.detach()
    torch.compiler.reset()


def test_mid_block_compiled_between_two_adapters(models):
    """Both adapters get the same `h`, in either order."""
    found = []
    for compiled in (False, True):
        pipe = torch_adapters.with_small_unet(fresh(models["sd"]))
        first, second = make_adapter(8), make_adapter(8)
        first.attach(pipe)
        draw(pipe)
        if compiled:
            compile_mid_block(pipe, backend="eager")
        second.attach(pipe)
        found.append(draw(pipe))
        first.detach()
        second.detach()
        torch.compiler.reset()
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


def check_compiled(models, compiling, attach_first):
    pipe = torch_adapters.with_small_unet(fresh(models["sd"]))
    plain = draw(pipe)
    adapter = make_adapter(8).attach(pipe)
    eager = [draw(pipe), draw(pipe, guidance_scale=1.0)]
    adapter.detach()
    if attach_first:
        adapter.attach(pipe)
    compiling(pipe, fullgraph=True, backend="eager")
    if not attach_first:
        assert torch.allclose(draw(pipe), plain, rtol=1e-5, atol=1e-6)
        adapter.attach(pipe)
    for scale, expected in zip((5.0, 1.0), eager, strict=True):
        assert torch.allclose(draw(pipe, guidance_scale=scale), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="repeats the latents of the last call"):
        run_own_loop(pipe.unet, separate, states(pipe))
    adapter.detach()
    assert torch.allclose(draw(pipe), plain, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("compiling", COMPILE)
def test_compiled_unets(models, compiling, attach_first):
    check_compiled(models, compiling, attach_first)


def test_replaced_mid_block_is_refused(models):
    pipe = fresh(models["sd"])
    make_adapter().attach(pipe)
    pipe.unet.mid_block = copy.deepcopy(pipe.unet.mid_block)
    with pytest.raises(ValueError, match="without its steered mid-block, which was compiled or re"):
        draw(pipe)


def saved_and_loaded(unet):
    file = io.BytesIO()
    torch.save(unet, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False), len(file.getvalue())


def test_copies_of_the_unet_are_not_steered(models):
    pipe = fresh(models["sd"])
    plain, (_, size) = draw(pipe), saved_and_loaded(pipe.unet)
    adapter = make_adapter().attach(pipe)
    steered = draw(pipe)
    loaded, size_attached = saved_and_loaded(pipe.unet)
    assert size_attached < size + 1000
    whole = copy.deepcopy(pipe)
    for unet in (copy.deepcopy(pipe.unet), loaded, whole.unet):
        parts = pipe.components | {"unet": unet, "requires_safety_checker": False}
        other = quiet(diffusers.StableDiffusionPipeline(**parts))
        assert torch.equal(draw(other), plain)
    assert torch.equal(draw(whole), plain)
    again = copy.deepcopy(adapter).attach(whole)  # the copy of an adapter is not attached
    assert torch.equal(draw(whole), steered)
    again.detach()
    assert torch.equal(draw(whole), plain) and torch.equal(draw(pipe), steered)
    adapter.detach()
    assert torch.equal(draw(pipe), plain)


def test_adapter_follows_another_unet(models):
    pipe, other = fresh(models["sd"]), fresh(models["sd"])
    for parameter in other.unet.parameters():
        parameter.data *= 1.01
    first, plain = pipe.unet, draw(other)
    adapter = make_adapter().attach(pipe)
    kind = type(models["sd"])
    pipe.unet = other.unet
    with recorded(other.unet) as calls:
        draw(pipe)
    assert calls == [GUIDED] * 2
    assert not first.mid_block._forward_hooks and not first._forward_hooks
    pipe.unet = None  # as scripts do to free memory
    pipe.unet = first
    with recorded(first) as calls:
        draw(pipe)
    assert calls == [GUIDED] * 2 and torch.equal(draw(other), plain)
    torch.manual_seed(0)
    wide = diffusers.UNet2DConditionModel.from_config(first.config, block_out_channels=(32, 96))
    with pytest.raises(ValueError, match=r"has 64 channels .* has 96"):
        pipe.unet = wide
    assert pipe.unet is first and isinstance(pipe, kind)
    adapter.detach()
    assert type(pipe) is kind


@pytest.mark.slow
def test_export_is_refused(models):
    pipe = fresh(models["sd"])
    adapter = make_adapter().attach(pipe)
    call = (noise(4), torch.tensor(1), torch.cat(states(pipe)))
    with pytest.raises(ValueError, match="an exported UNet cannot be steered"):
        torch.export.export(pipe.unet, call)
    adapter.detach()
    torch.export.export(pipe.unet, call)


def modular(pipe, guider):
    blocks = importlib.import_module("diffusers.modular_pipelines.stable_diffusion_xl")
    pipeline = blocks.StableDiffusionXLAutoBlocks().init_pipeline()
    pipeline.update_components(**pipe.components, guider=guider)
    return quiet(pipeline)


def draw_modular(pipe):
    options = {"prompt": PROMPTS, "num_inference_steps": 2, "height": 16, "width": 16}
    return pipe(**options, generator=generator(), output="latents")


PAG = {
    "perturbed_guidance_config": {
        "indices": [0],
        "fqn": "mid_block.attentions.0.transformer_blocks",
        "skip_attention": False,
        "skip_attention_scores": True,
        "skip_ff": False,
    },
    "perturbed_guidance_start": 0.0,
    "perturbed_guidance_stop": 1.0,
}
# The guider perturbs from the second of two steps on.
WITH_PAG = [UNGUIDED, UNCOND, UNGUIDED, UNCOND, UNGUIDED]
GUIDERS = {
    "CFG": ("ClassifierFreeGuidance", {"guidance_scale": 5.0}, [UNGUIDED, UNCOND]),
    "no guidance": ("ClassifierFreeGuidance", {"guidance_scale": 1.0}, [UNGUIDED]),
    "APG": ("AdaptiveProjectedGuidance", {"guidance_scale": 5.0}, [UNGUIDED, UNCOND]),
    "PAG": ("PerturbedAttentionGuidance", PAG, WITH_PAG),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_modular_pipelines(models, name):
    kind, options, expected = GUIDERS[name]
    pipe = modular(fresh(models["sdxl"]), getattr(diffusers, kind)(**options))
    check(pipe, lambda: draw_modular(pipe), expected)


def test_modular_pipeline_that_shares_the_unet(models):
    base = fresh(models["sdxl"])
    adapter = make_adapter().attach(base)
    draw(base)
    pipe = modular(base, diffusers.ClassifierFreeGuidance(guidance_scale=5.0))
    with recorded(base.unet) as calls:
        draw_modular(pipe)
    assert calls == [UNGUIDED, UNCOND] * 2
    adapter.detach()


def test_modular_pipelines_read_prompts(models):
    base = fresh(models["sdxl"])
    adapter = make_adapter()
    width = base.unet.config.cross_attention_dim
    adapter._reading = torch.randn(1, 3, width, generator=generator()), torch.zeros(1, 3)
    expected = adapter.attach(base).read(PROMPTS)
    pipe = modular(base, diffusers.ClassifierFreeGuidance())
    assert torch.equal(adapter.attach(pipe).read(PROMPTS), expected)


def test_copies_are_compared_at_the_first_step_only(models, monkeypatch):
    """On a GPU each comparison waits for the device."""
    pipe, compared = fresh(models["sd"]), []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *pair: compared.append(pair) or equal(*pair))
    adapter = make_adapter().attach(pipe)
    draw(pipe, steps=4)
    assert len(compared) == 1
    draw(pipe, steps=4)
    assert len(compared) == 1
    draw(pipe, PROMPTS * 2, steps=4)
    assert len(compared) == 2
    adapter.detach()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["constant", "mlp"])
def test_hooks_take_less_than_half_a_percent_of_a_unet_call(kind, monkeypatch):
    """A UNet of SD 1.5's size with random weights, one picture under guidance, float32."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8
    ).eval()
    adapter = torch_adapters.make_adapter(kind, shape=(1280, 8, 8), resolution=512)
    adapter.set_concepts({"a woman": 1.0})
    hook = torch_adapter._UNetHook(unet)
    hook.adapters.append(adapter)
    spent = []
    for part in (torch_adapter._UNetHook, torch_adapter._MidBlockHook):

        def timed(self, *args, call=part.__call__):
            start = time.perf_counter()
            result = call(self, *args)
            spent.append(time.perf_counter() - start)
            return result

        monkeypatch.setattr(part, "__call__", timed)
    call = torch.randn(1, 4, 64, 64).repeat(2, 1, 1, 1), 1, torch.randn(2, 77, 768)
    with torch.no_grad():
        unet(*call)
        spent.clear()
        start = time.perf_counter()
        unet(*call)
        share = sum(spent) / (time.perf_counter() - start)
    print(f"\n{kind}: {1e3 * sum(spent):.2f} ms, {share:.3%} of a UNet call")
    assert len(spent) == 3 and share < 0.005
