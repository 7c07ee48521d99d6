"""Small pipelines, and which samples an adapter steers at each call of their UNet; without JAX.

In the expected calls "+" is a steered sample and "-" another one: "--++" is a guided call for two
images.
"""

import contextlib
import copy

import pipelines
import torch
import torch_adapters

PROMPTS = ["a person", "a man"]
GUIDED, UNGUIDED, UNCOND = "--++", "++", "--"


def make_adapter(height=4):
    """An adapter of one concept for the tiny pipelines, chosen for every image."""
    adapter = torch_adapters.make_adapter(shape=(64, height, height))
    adapter.set_concepts({"a woman": 1.0})
    return adapter


def make_models(tmp_path_factory):
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
