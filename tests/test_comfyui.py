"""The ComfyUI nodes: with the option dictionaries that ComfyUI passes, and in ComfyUI itself.

The marker `comfyui` runs the second part, with a checkout of ComfyUI that `COMFYUI` names.
"""

import functools
import importlib
import json
import os
import pathlib
import sys
import types

import diffusers
import pytest
import torch
import torch_adapters

from respodiff_jax import comfyui
from respodiff_jax.torch_adapter import RespoDiffAdapter

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ROOT = pathlib.Path(__file__).parents[1]
KINDS = ("constant", "mlp", "conv")
FOLDER = ROOT / "respodiff_jax" / "emoji" / "model"
SHIPPED = ROOT / "respodiff_jax" / "emoji" / "adapters" / "gender"


def load(kind="mlp"):
    """An adapter for Emoji World."""
    names = ("a woman", "a man", "anti-violence")
    return torch_adapters.make_adapter(kind, names, (192, 4, 4), 64)


def node_choice(adapter, concepts):
    choice = comfyui.Choice(adapter)
    choice.adapter.set_concepts(concepts)
    return choice


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS = [{"a woman": 1.0}, {"a man": 0.5}]


@pytest.mark.parametrize("chunks", [[1, 0], [0, 1], [1, 0, 0], [0], [1], [0, 1, 0, 1]])
@pytest.mark.parametrize("kind", KINDS)
def test_positive_chunks_are_steered_and_others_stay_to_the_bit(kind, chunks):
    adapter, h = load(kind), random(2 * len(chunks), 192, 4, 4)
    steered = comfyui.steer(
        [node_choice(adapter, ROWS)], h, None, {"cond_or_uncond": chunks, "uuids": [0]}
    )
    adapter.set_concepts(ROWS)
    for i, entry in enumerate(chunks):
        part = h[2 * i : 2 * i + 2]
        expected = part if entry else part + adapter.delta(part)
        torch.testing.assert_close(steered[2 * i : 2 * i + 2], expected, rtol=0, atol=0)


def test_choices_of_several_nodes_add_up_from_the_same_h():
    first, second = load("mlp"), load("conv")
    one, two = node_choice(first, {"a woman": 1.0}), node_choice(second, {"a man": 1.0})
    h, options = random(2, 192, 4, 4), {"cond_or_uncond": [0]}
    expected = h + one.adapter.delta(h) + two.adapter.delta(h)
    torch.testing.assert_close(comfyui.steer([one, two], h, None, options), expected)
    half = comfyui.steer([one, two], h.half(), None, options)
    assert half.dtype == torch.float16


def test_concepts_steer_up_to_their_max_timestep():
    adapter, h, options = load(), random(4, 192, 4, 4), {"cond_or_uncond": [1, 0]}
    adapter.max_timesteps = [900, None, None]
    choice = node_choice(adapter, ROWS)
    whole = comfyui.steer([choice], h, None, options, torch.tensor([900.0, 900.0] * 2))
    assert (whole != h).flatten(1).any(1).tolist() == [False, False, True, True]
    late = comfyui.steer([choice], h, None, options, torch.tensor([901.0, 901.0] * 2))
    assert torch.equal(late[2], h[2]) and torch.equal(late[3], whole[3])
    with pytest.raises(ValueError, match="steers at some timesteps, unknown here; set steer_alw"):
        comfyui.steer([choice], h, None, options)
    choice.adapter.steer_always = True
    for timesteps in (None, torch.tensor([901.0] * 4)):
        assert torch.equal(comfyui.steer([choice], h, None, options, timesteps), whole)


def test_fair_deals_each_batch_by_its_seed():
    adapter = load()
    h, options = random(8, 192, 4, 4), {"cond_or_uncond": [1, 0]}
    picks = []
    for seed in range(6):
        choice = comfyui.Choice(adapter, ("gender", seed))
        first = comfyui.steer([choice], h, None, options)
        assert torch.equal(comfyui.steer([choice], h, None, options), first)
        picks.append(choice.adapter._weights.tolist())
        assert choice.adapter._weights.sum(0).tolist() == [2.0, 2.0, 0.0]
    assert len(set(map(str, picks))) > 1
    assert comfyui.steer([choice], h[:4], None, options).shape == (4, 192, 4, 4)  # deals again


def test_scales_of_fair_and_safe_multiply_the_default_scales(monkeypatch):
    adapter = load()
    adapter.default_scales = [0.5, 0.25, 0.6]
    monkeypatch.setattr(comfyui, "patched", lambda model, choice: choice)
    for scale in (1.0, 2.0):
        [fair] = comfyui.Fair().run(None, adapter, "gender", 0, scale)
        fair.deal(2)
        assert fair.adapter._weights.sum(0).tolist() == [scale * 0.5, scale * 0.25, 0.0]
        [safe] = comfyui.Safe().run(None, adapter, scale)
        assert safe.adapter._weights[0].tolist() == pytest.approx([0.0, 0.0, scale * 0.6])
    assert adapter.default_scales == [0.5, 0.25, 0.6]


def test_what_does_not_fit_is_refused():
    adapter = load()
    choice, options = node_choice(adapter, {"a man": 1.0}), {"cond_or_uncond": [0]}
    with pytest.raises(ValueError, match="mid-block has 192 channels, this model's has 64"):
        comfyui.steer([choice], random(1, 64, 4, 4), None, options)
    with pytest.raises(ValueError, match="chosen for 2 images, but the batch has 3"):
        comfyui.steer([node_choice(adapter, ROWS)], random(3, 192, 4, 4), None, options)
    choice.adapter.config = choice.adapter.config | {"reading": {"text_features": 8}}
    for text, message in [(None, "reads prompts, which are"), (random(1, 5, 9), "of 8 features")]:
        with pytest.raises(ValueError, match=message):
            comfyui.steer([choice], random(1, 192, 4, 4), text, options)
    with pytest.raises(ValueError, match="no group 'age'"):
        comfyui.Fair().run(None, adapter, "age", 0, 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a woman=1, a man = 0.5", {"a woman": 1.0, "a man": 0.5}),
        ("a woman=1.0\na man=0.5\n", ROWS),
        ("", {}),
    ],
)
def test_concepts_are_read_from_a_text(text, expected):
    assert comfyui.parse_concepts(text) == expected
    with pytest.raises(ValueError, match="'a woman': expected NAME=SCALE"):
        comfyui.parse_concepts("a woman")


def test_output_block_patch_acts_before_the_first_output_block():
    choice = node_choice(load(), {"a man": 1.0})
    patch = comfyui.output_block_patch([choice])
    h, skipped = random(2, 192, 4, 4), random(2, 64, 4, 4)
    options = {"cond_or_uncond": [1, 0], "block": ("output", 0)}
    steered, same = patch(h, skipped, options)
    assert same is skipped and torch.equal(steered[0], h[0]) and not torch.equal(steered[1], h[1])
    assert patch(h, skipped, options | {"block": ("output", 1)})[0] is h


def test_workflow_of_the_documentation_has_the_inputs_of_the_nodes():
    workflow = json.loads((ROOT / "docs" / "comfyui_workflow.json").read_text())
    ours = {n["class_type"] for n in workflow.values()} & set(comfyui.NODE_CLASS_MAPPINGS)
    assert ours == {"RespoDiffLoadAdapter", "RespoDiffFair", "RespoDiffSafe"}
    for node in workflow.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in workflow
        if node["class_type"] in ours:
            inputs = comfyui.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
            assert set(inputs["required"]) <= set(node["inputs"])
            assert set(node["inputs"]) <= set(inputs["required"] | inputs.get("optional", {}))


# ---- in ComfyUI itself


@functools.cache
def comfy():
    """ComfyUI's modules, imported for the CPU."""
    sys.path.insert(0, os.environ["COMFYUI"])
    sys.argv = ["x", "--cpu"]
    importlib.import_module("comfy.options").enable_args_parsing()
    for name in ("model_base", "model_patcher", "sample", "samplers", "supported_models"):
        importlib.import_module(f"comfy.{name}")
    return importlib.import_module("comfy")


@functools.cache
def pipeline():
    pipe = diffusers.DiffusionPipeline.from_pretrained(FOLDER)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def comfy_model():
    """Emoji World in ComfyUI, a ModelPatcher."""
    module, pipe = comfy(), pipeline()
    unet = {
        **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64},
        **{"num_res_blocks": [1, 1, 1], "channel_mult": [1, 1, 3], "context_dim": 192},
        **{"transformer_depth": [0] * 3, "transformer_depth_middle": 4, "num_heads": 4},
        **{"transformer_depth_output": [0] * 6, "use_spatial_transformer": True},
        **{"use_linear_in_transformer": False, "adm_in_channels": None, "legacy": False},
        **{"use_temporal_attention": False, "use_temporal_resblock": False},
    }

    class EmojiWorld(module.supported_models.SD15):
        unet_extra_config = types.MappingProxyType({"num_heads": 4, "num_head_channels": -1})

    config = EmojiWorld(unet)
    config.unet_config["dtype"] = torch.float32
    model = module.model_base.BaseModel(config).eval()
    keys = module.utils.unet_to_diffusers(unet)
    state = {keys[key]: value for key, value in pipe.unet.state_dict().items()}
    model.diffusion_model.load_state_dict(state)
    cumulative = pipe.scheduler.alphas_cumprod
    model.model_sampling.set_sigmas(((1 - cumulative) / cumulative) ** 0.5)
    device = torch.device("cpu")
    return module.model_patcher.ModelPatcher(model, device, device)


STEPS, NOISE = 4, random(2, 4, 16, 16, seed=4)
PROMPTS = ["a photo of a cook", "a photo of a judge"]


def texts(pipe, prompts):
    with torch.no_grad():
        return pipe.encode_prompt(prompts, "cpu", 1, False)[0]


def sigmas(pipe):
    pipe.scheduler.set_timesteps(STEPS)
    return pipe.scheduler.sigmas


def draw_comfy(model, scale, prompts=PROMPTS[:1]):
    """Latents of `prompts`, each a conditioning of its own, from ComfyUI's Euler sampler."""
    module, pipe = comfy(), pipeline()
    with torch.no_grad():
        latents = module.sample.sample_custom(
            model,
            NOISE,
            scale,
            module.samplers.sampler_object("euler"),
            sigmas(pipe),
            [[texts(pipe, prompt), {}] for prompt in prompts],
            [[texts(pipe, ""), {}]],
            torch.zeros_like(NOISE),
            disable_pbar=True,
            seed=0,
        )
    return latents * model.model.latent_format.scale_factor


def draw_diffusers(model, scale, prompt=PROMPTS[0]):
    pipe, sampling = pipeline(), model.model.model_sampling
    first = sigmas(pipe)[0]
    most = abs(float(sampling.sigma_max) - float(first)) < 1e-5 or first > sampling.sigma_max
    start = sampling.noise_scaling(first, NOISE, torch.zeros_like(NOISE), most)
    return pipe(
        [prompt] * len(NOISE),
        latents=start / pipe.scheduler.init_noise_sigma,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        output_type="latent",
    ).images


def difference(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.comfyui
@pytest.mark.parametrize("scale", [5.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [False, True], ids=["joint", "separate"])
def test_latents_equal_those_of_the_pytorch_adapter(kind, scale, split, monkeypatch):
    model, adapter = comfy_model(), load(kind)
    if split:
        monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 1e30)
    base = draw_comfy(model, scale)
    print(f"unsteered: {difference(draw_diffusers(model, scale), base):.1e}")
    concepts = "a woman=0.02\na man=0.01" if kind != "constant" else "a woman=0.5\na man=0.3"
    [patched] = comfyui.Concepts().run(model, adapter, concepts)
    found = draw_comfy(patched, scale)
    adapter.attach(pipeline()).set_concepts(comfyui.parse_concepts(concepts))
    expected = draw_diffusers(model, scale)
    adapter.detach()
    print(f"{kind} {scale}: {difference(found, expected):.1e}, {difference(found, base):.1e}")
    assert difference(found, expected) < 1e-3 < 1e-2 < difference(found, base)
    assert torch.equal(draw_comfy(model, scale), base)


@pytest.mark.comfyui
@pytest.mark.parametrize("split", [False, True], ids=["joint", "separate"])
@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [("a photo of a cook", True), ("a photo of a woman pilot", False), ("a photo of a cat", False)],
)
def test_an_adapter_that_reads_steers_only_open_prompts(prompt, is_open, split, monkeypatch):
    model, adapter = comfy_model(), RespoDiffAdapter.from_pretrained(SHIPPED)
    if split:
        monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 1e30)
    [patched] = comfyui.Concepts().run(model, adapter, "a woman=1.0")
    base, found = (draw_comfy(m, 5.0, [prompt]) for m in (model, patched))
    if not is_open:
        assert torch.equal(found, base)
        return
    adapter.attach(pipeline()).set_concepts({"a woman": 1.0})
    expected = draw_diffusers(model, 5.0, prompt)
    adapter.detach()
    assert difference(found, expected) < 1e-3 < 1e-2 < difference(found, base)


@pytest.mark.comfyui
@pytest.mark.parametrize("split", [False, True], ids=["joint", "separate"])
def test_two_conditionings_are_both_steered(split, monkeypatch):
    """ComfyUI averages them; a hand-made mean of the UNet's predictions is the same."""
    model, adapter = comfy_model(), load()
    if split:
        monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 1e30)
    [patched] = comfyui.Concepts().run(model, adapter, "a woman=0.02\na man=0.01")
    found = draw_comfy(patched, 5.0, PROMPTS)
    pipe, choice = pipeline(), node_choice(adapter, ROWS)
    choice.adapter.set_concepts([{"a woman": 0.02}, {"a man": 0.01}])
    sampling, levels = model.model.model_sampling, sigmas(pipe)
    most = float(levels[0]) >= float(sampling.sigma_max) - 1e-5
    x = sampling.noise_scaling(levels[0], NOISE, torch.zeros_like(NOISE), most)
    context = [texts(pipe, prompt).repeat(2, 1, 1) for prompt in ("", *PROMPTS)]
    adapter.attach(pipe).set_concepts([{"a woman": 0.02}, {"a man": 0.01}])
    for t, sigma, following in zip(pipe.scheduler.timesteps, levels[:-1], levels[1:], strict=True):
        scaled, eps = x / (sigma**2 + 1) ** 0.5, []
        with torch.no_grad():
            with adapter.disabled():
                eps.append(pipe.unet(scaled, t, context[0]).sample)
            for text in context[1:]:
                adapter._hook._last = None  # each conditional call repeats the latents
                eps.append(pipe.unet(scaled, t, text).sample)
        uncond, cond = eps[0], (eps[1] + eps[2]) / 2
        x = x + (uncond + 5.0 * (cond - uncond)) * (following - sigma)
    adapter.detach()
    assert difference(found, x) < 1e-3


@pytest.mark.comfyui
def test_a_controlnet_adds_after_the_adapter():
    model, adapter, pipe = comfy_model(), load(), pipeline()
    [patched] = comfyui.Concepts().run(model, adapter, "a woman=0.02")
    residual, x, text = random(2, 192, 4, 4, seed=8), NOISE, texts(pipe, PROMPTS)
    kind = comfy().patcher_extension.WrappersMP.DIFFUSION_MODEL
    options = {
        "cond_or_uncond": [0],
        "wrappers": {kind: {"x": patched.get_wrappers(kind, "respodiff")}},
    }
    # diffusers adds the residual of the mid-block only beside those of the skip connections.
    residuals = {"mid_block_additional_residual": residual}
    residuals["down_block_additional_residuals"] = (torch.zeros(()),) * 6
    with torch.no_grad():
        found = model.model.diffusion_model(
            x,
            torch.tensor([500, 500]),
            text,
            control={"middle": [residual]},
            transformer_options=options,
        )
        adapter.attach(pipe).set_concepts({"a woman": 0.02})
        expected = pipe.unet(x, 500, text, **residuals).sample
        adapter.detach()
        plain = pipe.unet(x, 500, text, **residuals).sample
    assert difference(found, expected) < 1e-4 < 1e-3 < difference(plain, expected)


@pytest.mark.comfyui
def test_nodes_of_several_adapters_chain():
    model = comfy_model()
    [fair] = comfyui.Fair().run(model, load("mlp"), "gender", 3, 0.02)
    [both] = comfyui.Safe().run(fair, load("conv"), 0.01)
    kind = comfy().patcher_extension.WrappersMP.DIFFUSION_MODEL
    assert [len(m.get_wrappers(kind, "respodiff")) for m in (model, fair, both)] == [0, 1, 1]
    first, second = (draw_comfy(m, 5.0) for m in (fair, both))
    assert torch.equal(draw_comfy(fair, 5.0), first)
    assert second.isfinite().all() and difference(second, first) > 1e-3
