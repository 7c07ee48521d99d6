"""PyTorch adapters on compiled, offloaded, shared and unsuitable pipelines."""

import functools
import importlib.util

import accelerate
import diffusers
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from test_adapters import make_adapter
from torch_adapters import with_small_unet
from torch_pipelines import (
    ROWS,
    SHAPE,
    assert_close,
    make_load,
    people,
    pipeline,
    torch_latents,
)

from respodiff_jax import torch_adapter
from respodiff_jax.adapters import save_adapter

load = pytest.fixture(make_load)


def one_level_pipeline(folder):
    """A folder's pipeline with a mid-block of (8, 8, 64)."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return with_small_unet(pipe)


@pytest.mark.parametrize("attach_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_torch_compile_follows_every_change(sd_folder, load, attach_first):
    """`fullgraph=True` would refuse a graph break; new scales and guidance add few graphs."""
    pipe = one_level_pipeline(sd_folder)
    run = functools.partial(torch_latents, pipe, steps=2)
    adapter = load(people("mlp", shape=(8, 8, 64)))
    base = run()
    adapter.attach(pipe).set_concepts(ROWS)
    eager, eager_unguided = run(), run(guidance_scale=1.0)
    adapter.set_concepts({"a man": 1.0})
    eager_man = run()
    adapter.detach()

    adapter.set_concepts(ROWS)
    counter = torch._dynamo.testing.CompileCounter()
    if attach_first:
        adapter.attach(pipe)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=counter)
    if not attach_first:
        assert_close(run(), base, 1e-6)
        adapter.attach(pipe)
    assert_close(run(), eager, 1e-6)
    assert_close(run(guidance_scale=1.0), eager_unguided, 1e-6)
    adapter.set_concepts({"a man": 1.0})
    assert_close(run(), eager_man, 1e-6)
    graphs = counter.frame_count
    for scale in (0.5, 0.25, 2.0):
        adapter.set_concepts({"a woman": scale})
        run(guidance_scale=3 + scale)
    assert counter.frame_count <= graphs + 1
    with adapter.disabled():
        assert_close(run(), base, 1e-6)
    adapter.detach()
    assert_close(run(), base, 1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_cpu_offload(sd_folder, load, offload):
    pipe = diffusers.DiffusionPipeline.from_pretrained(sd_folder)
    pipe.set_progress_bar_config(disable=True)
    adapter = load(people("conv"))
    adapter.set_concepts(ROWS)
    adapter.attach(pipe)
    expected = torch_latents(pipe, steps=2)
    adapter.detach()
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:  # as in the pipeline's own method, which needs a GPU for CLIP's buffers
        accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    assert isinstance(pipe.unet._hf_hook, accelerate.hooks.ModelHook)
    weight = pipe.unet.mid_block.resnets[0].conv1.weight
    assert weight.device.type == ("meta" if offload == "sequential" else "cpu")
    adapter.attach(pipe)
    for _ in range(2):  # after a call the pipeline installs its hooks again
        np.testing.assert_array_equal(torch_latents(pipe, steps=2), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"shape": (4, 4, 32)},
            "some/model, whose mid-block has 32 channels and .*, this pipeline's has 64 and 4",
        ),
        # As for SD 1.4 and SDXL: the same number of channels, but halved once more.
        ({"resolution": 32}, "64 channels and a position for each 8 pixels, .* has 64 and 4: use"),
        ({"prediction_type": "v_prediction"}, "predicts 'v_prediction'; this pipeline's scheduler"),
    ],
)
def test_other_backbone_is_refused_and_nothing_is_attached(sd_folder, load, change, message):
    pipe = pipeline(sd_folder)
    with pytest.raises(ValueError, match=message):
        load(make_adapter(**{"shape": SHAPE} | change)).attach(pipe)
    assert not pipe.unet.mid_block._forward_hooks


REFUSED = {
    "StableDiffusionInstructPix2PixPipeline": "image_guidance_scale",
    "StableDiffusionSAGPipeline": "sag_scale",
    "StableDiffusionPanoramaPipeline": "view_batch_size",
    "LEditsPPPipelineStableDiffusionXL": "editing_prompt",
    "DDPMPipeline": "guidance_scale",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_pipeline_classes_are_refused(load, name, request):
    folder = request.getfixturevalue("sdxl_folder" if name.endswith("XL") else "sd_folder")
    parts = pipeline(folder).components
    wanted = ("unet", "scheduler") if name == "DDPMPipeline" else parts
    pipe = getattr(diffusers, name)(**{key: parts[key] for key in wanted})
    with pytest.raises(ValueError, match=f"{name} cannot take the adapter: .*{REFUSED[name]}"):
        load(people()).attach(pipe)


class UNetMotionModel(torch.nn.Module):
    """A UNet for videos, which calls its mid-block with frames instead of images."""

    def __init__(self, unet):
        super().__init__()
        self.config, self.mid_block = unet.config, unet.mid_block


@pytest.mark.parametrize("compiled", [True, False])
def test_other_unet_classes_are_refused(sd_folder, load, compiled):
    pipe = diffusers.DiffusionPipeline.from_pretrained(sd_folder)
    unet = UNetMotionModel(pipe.unet)
    pipe.unet = torch.compile(unet, backend="eager") if compiled else unet
    with pytest.raises(
        ValueError, match=r"its unet is a UNetMotionModel; .* is a UNet2DConditionModel"
    ):
        load(people()).attach(pipe)


def test_other_hub_model_gives_a_warning(sd_folder, load):
    pipe = diffusers.DiffusionPipeline.from_pretrained(sd_folder)
    pipe.register_to_config(_name_or_path="other/model")
    with pytest.warns(UserWarning, match="trained on some/model, the pipeline is other/model"):
        load(people()).attach(pipe)


def test_wrong_batch_or_image_size_is_refused(sd_folder, load):
    pipe = pipeline(sd_folder)
    adapter = load(people()).attach(pipe)
    adapter.fair("gender", 3)
    with pytest.raises(ValueError, match="chosen for 3 images, but the batch has 4"):
        torch_latents(pipe, steps=1)
    adapter.set_concepts({"a man": 1.0})
    noise = np.zeros((2, 16, 16, 4), np.float32)
    with pytest.raises(ValueError, match=r"\(64, 4, 4\), but these images have \(64, 8, 8\); gen"):
        torch_latents(pipe, noise=noise, height=32, width=32, steps=1)
    adapter.detach()


def test_adapters_of_pipelines_that_share_a_unet_share_a_hook(sd_folder, load):
    pipe = diffusers.DiffusionPipeline.from_pretrained(sd_folder)
    twin = diffusers.StableDiffusionPipeline.from_pipe(pipe)
    first, second = load(people()).attach(pipe), load(people("mlp")).attach(twin)
    assert first._hook is second._hook and len(pipe.unet.mid_block._forward_hooks) == 1
    first.detach()
    second.detach()
    assert not pipe.unet.mid_block._forward_hooks
    assert type(pipe) is type(twin) is diffusers.StableDiffusionPipeline


def test_attach_and_detach_work_in_any_order(sd_folder, load):
    pipe, adapter = diffusers.DiffusionPipeline.from_pretrained(sd_folder), load(people())
    pipe.set_progress_bar_config(disable=True)
    run = functools.partial(torch_latents, pipe, steps=2)
    base = run()
    adapter.detach()  # not attached
    adapter.attach(pipe).set_concepts({"a man": 1.0})
    steered = run()
    adapter.attach(pipe)  # attached twice, acts once
    np.testing.assert_array_equal(run(), steered)
    with adapter.disabled():
        with adapter.disabled():
            pass
        np.testing.assert_array_equal(run(), base)
    np.testing.assert_array_equal(run(), steered)
    with pytest.raises(ZeroDivisionError):
        run(callback_on_step_end=lambda *_: 1 / 0)
    adapter.detach()
    adapter.detach()
    np.testing.assert_array_equal(run(), base)

    adapter.attach(pipe)
    unet, pipe.unet = pipe.unet, None
    adapter.detach()
    assert not unet.mid_block._forward_hooks


def test_adapters_of_two_copies_of_the_file_share_a_hook(sd_folder, load, tmp_path):
    """The package's file and a copy beside an adapter: both adapters get the same `h`."""
    spec = importlib.util.spec_from_file_location("a_copy", torch_adapter.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    pipe = pipeline(sd_folder)
    ours = load(people("mlp")).attach(pipe)
    save_adapter(people("conv"), tmp_path / "theirs")
    theirs = copy.RespoDiffAdapter.from_pretrained(tmp_path / "theirs").attach(pipe)
    assert len(pipe.unet.mid_block._forward_hooks) == 1
    assert ours._hook is theirs._hook
    ours.detach()
    theirs.detach()
    assert not pipe.unet.mid_block._forward_hooks
