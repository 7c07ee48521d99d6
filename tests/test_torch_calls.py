"""Which samples the PyTorch adapter steers at each call of the UNet, however it is called.

Nothing here needs JAX: `launch/newest_torch.sh` runs this file with the newest diffusers. In the
expected calls "+" is a steered sample and "-" another one: "--++" is a guided call for two images.
"""

import contextlib
import copy
import importlib
import inspect
import io

import diffusers
import pipelines
import pytest
import torch
import torch_adapters
from diffusers.models.attention_processor import AttnProcessor

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PROMPTS = ["a person", "a man"]
GUIDED, UNGUIDED, UNCOND = "--++", "++", "--"


def make_adapter(height=4):
    """An adapter of one concept for the tiny pipelines, chosen for every image."""
    adapter = torch_adapters.make_adapter(shape=(64, height, height))
    adapter.set_concepts({"a woman": 1.0})
    return adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "sd": pipelines.stable_diffusion(folder / "sd"),
        "sdxl": pipelines.stable_diffusion_xl(folder / "sdxl"),
    }


def fresh(pipe):
    """The same pipeline with its own copy of the UNet and scheduler, quiet."""
    parts = pipe.components | {
        "unet": copy.deepcopy(pipe.unet),
        "scheduler": copy.deepcopy(pipe.scheduler),
    }
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    return quiet(type(pipe)(**parts))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator():
    return torch.Generator().manual_seed(3)


def noise(count=2):
    return torch.randn(count, 4, 8, 8, generator=generator())


def draw(pipe, prompts=PROMPTS, guidance_scale=5.0, steps=2, **options):
    options = {"generator": generator(), "output_type": "latent"} | options
    if not {"image", "latents"} & set(options):
        options["latents"] = noise(len(prompts) * options.get("num_images_per_prompt", 1))
    return pipe(prompts, num_inference_steps=steps, guidance_scale=guidance_scale, **options).images


@contextlib.contextmanager
def recorded(unet):
    """Lists what each call of the UNet steers; the adapter is attached before."""
    calls, plain = [], []
    middle = getattr(unet.mid_block, "_orig_mod", unet.mid_block)

    @torch.compiler.disable
    def after(module, args, h):
        pairs = zip(plain.pop(), h, strict=True)
        calls.append("".join("-" if torch.equal(*pair) else "+" for pair in pairs))

    @torch.compiler.disable
    def before(module, args, h):
        plain.append(h)

    handles = [
        middle.register_forward_hook(before, prepend=True),
        middle.register_forward_hook(after),
    ]
    yield calls
    for handle in handles:
        handle.remove()


def check(pipe, run, expected, unet=None):
    """The UNet's calls are steered as expected; afterwards everything is as before, to the bit."""
    unet = unet or pipe.unet
    unet = getattr(unet, "_orig_mod", unet)
    plain = run()
    adapter = make_adapter().attach(pipe)
    with recorded(unet) as calls:
        steered = run()
    assert calls and all(
        call == wanted
        for call, wanted in zip(calls, [*expected] * (len(calls) // len(expected)), strict=True)
    ), calls
    if any("+" in call for call in calls):
        assert not torch.equal(steered, plain)
    with adapter.disabled():
        assert torch.equal(run(), plain)
    adapter.detach()
    assert torch.equal(run(), plain)
    assert not unet._forward_hooks and not unet._forward_pre_hooks


OPTIONS = {
    "guided": ({}, [GUIDED]),
    "guidance 1": ({"guidance_scale": 1.0}, [UNGUIDED]),
    "guidance 0": ({"guidance_scale": 0.0}, [UNGUIDED]),
    "one image": ({"prompts": PROMPTS[:1]}, ["-+"]),
    "one image, guidance 1": ({"prompts": PROMPTS[:1], "guidance_scale": 1.0}, ["+"]),
    "negative prompt": ({"negative_prompt": ["no man", "no person"]}, [GUIDED]),
    "negative prompt equals prompt": ({"negative_prompt": PROMPTS}, [GUIDED]),
    "empty prompt": ({"prompts": ["", ""]}, [GUIDED]),
    "two images each": ({"num_images_per_prompt": 2}, ["----++++"]),
    "same noise": ({"latents": noise(1).repeat(2, 1, 1, 1)}, [GUIDED]),
    "same noise, guidance 1": (
        {"latents": noise(1).repeat(2, 1, 1, 1), "guidance_scale": 1.0},
        [UNGUIDED],
    ),
    "guidance rescale": ({"guidance_rescale": 0.7}, [GUIDED]),
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("model", ["sd", pytest.param("sdxl", marks=SLOW)])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_text_to_image(models, model, name):
    options, expected = OPTIONS[name]
    pipe = fresh(models[model])
    check(pipe, lambda: draw(pipe, **options), expected)


SCHEDULERS = [
    *("DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "PNDM", "LCM"),
    *("DPMSolverSinglestep", "HeunDiscrete", "LMSDiscrete", "UniPCMultistep", "DEISMultistep"),
    *("KDPM2Discrete", "KDPM2AncestralDiscrete", "TCD"),
]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(models, scheduler):
    pipe = fresh(models["sd"])
    kind = getattr(diffusers, f"{scheduler}Scheduler")
    pipe.scheduler = kind.from_config(pipe.scheduler.config, clip_sample=False)
    check(pipe, lambda: draw(pipe, steps=4 if scheduler == "PNDM" else 3), [GUIDED])


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
@pytest.mark.parametrize("model", ["StableDiffusion", "StableDiffusionXL"])
def test_image_to_image_and_inpainting(models, model, task, guidance_scale):
    base = fresh(models["sdxl" if model.endswith("XL") else "sd"])
    pipe = quiet(getattr(diffusers, f"{model}{task}Pipeline").from_pipe(base))
    image = torch.rand(2, 3, 16, 16, generator=generator())
    options = {"image": image, "strength": 0.8, "guidance_scale": guidance_scale, "steps": 3}
    if task == "Inpaint":
        options |= {"mask_image": (image[:, :1] > 0.5).float(), "height": 16, "width": 16}
    check(pipe, lambda: draw(pipe, **options), [GUIDED if guidance_scale > 1 else UNGUIDED])


def controlnet(unet):
    torch.manual_seed(0)
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 16))
    for convolution in (net.controlnet_mid_block, *net.controlnet_down_blocks):
        torch.nn.init.normal_(convolution.weight, std=0.1)  # initially zero
    return net.eval()


@pytest.mark.slow
@pytest.mark.parametrize("guess_mode", [False, True])
def test_controlnet(models, guess_mode):
    base = fresh(models["sd"])
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **base.components, controlnet=controlnet(base.unet), requires_safety_checker=False
    )
    image = torch.rand(2, 3, 16, 16, generator=generator())
    options = {"image": image, "latents": noise(), "guess_mode": guess_mode}
    check(quiet(pipe), lambda: draw(pipe, **options), [GUIDED])


def test_distilled_model_has_no_unconditional_half(models):
    base = fresh(models["sd"])
    torch.manual_seed(0)
    base.unet = diffusers.UNet2DConditionModel.from_config(base.unet.config, time_cond_proj_dim=8)
    check(base, lambda: draw(base), [UNGUIDED])


def test_guidance_that_a_callback_ends(models):
    pipe = fresh(models["sd"])

    def end(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]} if step == 0 else {}

    options = {"callback_on_step_end": end, "steps": 3}
    options["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
    check(pipe, lambda: draw(pipe, **options), [GUIDED, UNGUIDED, UNGUIDED])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(models, dtype):
    pipe = quiet(copy.deepcopy(models["sd"]).to(dtype))
    check(pipe, lambda: draw(pipe, latents=noise().to(dtype)), [GUIDED])


@pytest.mark.slow
def test_accelerate_offload(models):
    import accelerate

    pipe = fresh(models["sd"])
    accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    check(pipe, lambda: draw(pipe), [GUIDED])


def add_lora(pipe):
    peft = pytest.importorskip("peft")
    layers = ["to_q", "to_v", "conv1"]  # also in the mid-block
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    "prepare",
    [
        add_lora,
        lambda pipe: pipe.enable_attention_slicing(),
        lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
        lambda pipe: pipe.fuse_qkv_projections(),
        lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    ],
)
def test_changed_unets(models, prepare):
    pipe = fresh(models["sd"])
    prepare(pipe)
    check(pipe, lambda: draw(pipe), [GUIDED])


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_ip_adapter(models, guidance_scale):
    pipe, features = fresh(models["sd"]), 24
    width = pipe.unet.config.cross_attention_dim
    layers = {}
    for number, name in enumerate(pipe.unet.attn_processors):
        attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn2.processor"):
            for key in ("to_k", "to_v"):
                layers[f"{number}.{key}_ip.weight"] = getattr(attention, key).weight.detach()
    projection = {
        **{"proj.weight": torch.randn(4 * width, features), "proj.bias": torch.zeros(4 * width)},
        **{"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)},
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    picture = torch.randn(2 if guidance_scale > 1 else 1, 1, features, generator=generator())
    options = {"ip_adapter_image_embeds": [picture], "guidance_scale": guidance_scale}
    check(pipe, lambda: draw(pipe, **options), [GUIDED if guidance_scale > 1 else UNGUIDED])


def run_own_loop(unet, call, states, steps=2):
    """Denoises by hand, whatever `call(latents, t, uncond, cond)` does."""
    uncond, cond = states
    latents = noise(len(cond))
    with torch.no_grad():
        for t in torch.arange(900, 0, -900 // steps)[:steps]:
            latents = latents - 0.1 * call(unet, latents, t, uncond, cond)
    return latents


def states(pipe):
    with torch.no_grad():
        cond, uncond, *_ = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    return uncond, cond


def joint(unet, x, t, uncond, cond):
    return unet(torch.cat([x, x]), t, torch.cat([uncond, cond])).sample.chunk(2)[1]


def separate(unet, x, t, uncond, cond):
    u, c = (unet(x, t, encoder_hidden_states=text).sample for text in (uncond, cond))
    return u + 5 * (c - u)


def swapped(unet, x, t, uncond, cond):
    c, u = (unet(x, t, encoder_hidden_states=text).sample for text in (cond, uncond))
    return u + 5 * (c - u)


def conditional_only(unet, x, t, uncond, cond):
    return unet(x, t, cond).sample


@pytest.mark.parametrize("earlier", [5.0, 1.0])
class TestAfterAnEarlierCall:
    """The pipeline that the adapter is attached to has run, with and without guidance."""

    @pytest.fixture
    def pipe(self, models, earlier):
        pipe = fresh(models["sd"])
        self.adapter = make_adapter().attach(pipe)
        draw(pipe, guidance_scale=earlier)
        return pipe

    @pytest.mark.parametrize(("scale", "expected"), [(5.0, GUIDED), (1.0, UNGUIDED)])
    def test_another_pipeline_with_the_same_unet(self, pipe, scale, expected):
        others = [
            diffusers.StableDiffusionPipeline.from_pipe(pipe),
            diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False),
        ]
        for other in others:
            with recorded(pipe.unet) as calls:
                draw(quiet(other), guidance_scale=scale)
            assert calls == [expected] * 2

    @pytest.mark.parametrize(
        ("scale", "pag", "expected"),
        [(5.0, 3.0, "--++++"), (1.0, 3.0, "++++"), (5.0, 0.0, GUIDED), (1.0, 0.0, UNGUIDED)],
    )
    def test_perturbed_attention_guidance(self, pipe, scale, pag, expected):
        other = diffusers.AutoPipelineForText2Image.from_pipe(
            pipe, enable_pag=True, pag_applied_layers=["mid"]
        )
        with recorded(pipe.unet) as calls:
            draw(quiet(other), guidance_scale=scale, pag_scale=pag)
        assert calls == [expected] * 2

    def test_self_attention_guidance_is_refused(self, pipe):
        other = diffusers.StableDiffusionSAGPipeline(
            **pipe.components, requires_safety_checker=False
        )
        with pytest.raises(ValueError, match=r"SAGPipeline cannot take the adapter.*sag_scale"):
            draw(quiet(other), sag_scale=0.5)

    def test_own_loop_of_joint_calls(self, pipe):
        with recorded(pipe.unet) as calls:
            run_own_loop(pipe.unet, joint, states(pipe))
        assert calls == [GUIDED] * 2

    @pytest.mark.parametrize("call", [separate, swapped])
    def test_own_loop_of_separate_calls_is_refused(self, pipe, call):
        with pytest.raises(ValueError, match=r"repeats the latents .* `with adapter\.disabled"):
            run_own_loop(pipe.unet, call, states(pipe))

    def test_own_loop_that_says_which_call_is_unconditional(self, pipe):
        def call(unet, x, t, uncond, cond):
            with self.adapter.disabled():
                u = unet(x, t, uncond).sample
            return u + 5 * (unet(x, t, cond).sample - u)

        with recorded(pipe.unet) as calls:
            run_own_loop(pipe.unet, call, states(pipe))
        assert calls == [UNCOND, UNGUIDED] * 2

    def test_own_loop_without_guidance(self, pipe):
        with recorded(pipe.unet) as calls:
            run_own_loop(pipe.unet, conditional_only, states(pipe))
        assert calls == [UNGUIDED] * 2

    def test_own_loop_with_one_image(self, pipe):
        text = [part[:1] for part in states(pipe)]
        with recorded(pipe.unet) as calls:
            run_own_loop(pipe.unet, conditional_only, text)
        assert calls == ["+"] * 2

    def test_unclear_calls_are_refused(self, pipe):
        _, cond = states(pipe)
        same = noise(1).repeat(2, 1, 1, 1)
        for x, text in [(same, cond[:1].repeat(2, 1, 1)), (same[[0, 0, 0]], cond[[0, 1, 1]])]:
            with pytest.raises(ValueError, match="its latents repeat"):
                pipe.unet(x, 1, text)
        pipe.unet(same, 1, cond)  # looks like [uncond, cond] ...
        with pytest.raises(ValueError, match="only some calls have latents that repeat"):
            pipe.unet(noise(), 1, cond)  # ... but is not

    def test_call_of_forward_is_refused(self, pipe):
        with pytest.raises(ValueError, match=r"forward\(\) is called directly"):
            pipe.unet.forward(noise(), 1, states(pipe)[1])


def test_pipelines_that_do_not_say_which_half_are_refused(models):
    pipe = fresh(models["sd"])
    names = ("StableDiffusionDiffEditPipeline", "StableDiffusionGLIGENPipeline")
    for name in names:
        kind = getattr(diffusers, name)
        wanted = inspect.signature(kind.__init__).parameters
        parts = {key: value for key, value in pipe.components.items() if key in wanted}
        if "Edit" in name:
            parts["inverse_scheduler"] = diffusers.DDIMInverseScheduler()
        other = kind(**parts, requires_safety_checker=False)
        with pytest.raises(ValueError, match=f"{name} cannot .*: without .* guidance_sc"):
            make_adapter().attach(other)


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
