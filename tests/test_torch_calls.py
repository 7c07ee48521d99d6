"""Which samples the PyTorch adapter steers at each call of the UNet, however it is called.

Nothing here needs JAX: `launch/newest_torch.sh` runs this file with the newest diffusers.
"""

import copy
import inspect

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch_calls import (
    GUIDED,
    PROMPTS,
    UNCOND,
    UNGUIDED,
    check,
    conditional_only,
    draw,
    fresh,
    generator,
    joint,
    make_adapter,
    make_models,
    noise,
    quiet,
    recorded,
    run_own_loop,
    separate,
    states,
    swapped,
)

models = pytest.fixture(make_models, scope="module")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

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
