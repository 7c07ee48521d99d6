"""Models as they are found: equal to diffusers' own pipeline of the same folder, or refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from pipelines import torch_latents
from transformers import CLIPTokenizerFast

from respodiff_jax.backbone import load_backbone
from respodiff_jax.errors import UserError
from respodiff_jax.generation.sampling import SamplerOptions, denoise, initial_noise, sample_images
from respodiff_jax.method.schedule import Schedule

pytestmark = pytest.mark.filterwarnings(
    "ignore:The configuration file of:FutureWarning",  # diffusers corrects it, which is tested
    "ignore:.*non_ema:FutureWarning",
)
SCHEDULERS = {"dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}
PROMPT = "a woman, Café"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def folder(sd_folder, tmp_path):
    return shutil.copytree(sd_folder, tmp_path / "model")


def edit(file, *removed, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if k not in removed}))


def largest_difference(folder, prompt=PROMPT, num_steps=4, sampler="ddim", **options):
    """Of the latents here and in diffusers' pipeline of the folder, relative to their largest."""
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    if sampler != "ddim":
        pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    return difference_from(pipe, load_backbone(folder, **options), prompt, num_steps, sampler)


def difference_from(pipe, backbone, prompt=PROMPT, num_steps=4, sampler="ddim"):
    """Of a model's latents and a pipeline's, relative to their largest."""
    pipe.set_progress_bar_config(disable=True)
    resolution = backbone.default_resolution
    noise = initial_noise([0], backbone.latent_shape(resolution))
    schedule = Schedule.from_config(backbone.scheduler_config, num_steps, sampler)
    cond, uncond = (backbone.encode_prompts([text], resolution) for text in (prompt, ""))
    run = jax.jit(lambda params, *args: denoise(backbone, (), schedule, params, *args))
    ours = run(backbone.params, noise, cond, uncond, (), 5.0)
    theirs = torch_latents(pipe, prompt, noise, num_steps, 5.0)
    np.testing.assert_allclose(schedule.timesteps, pipe.scheduler.timesteps.numpy(), rtol=1e-6)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("removed", [(), ("steps_offset",)])
def test_steps_offset_is_that_of_the_pipeline(folder, removed):
    """F2: the pipelines of SD 1.x and 2.x set it to 1."""
    edit(folder / SCHEDULER, *removed, **({} if removed else {"steps_offset": 0}))
    assert Schedule.from_config(load_backbone(folder).scheduler_config, 50).timesteps[0] == 981
    assert largest_difference(folder) < 1e-4


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers
@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_samplers_draw_what_diffusers_draws(sd_v_folder, tmp_path, sampler, spacing):
    folder = shutil.copytree(sd_v_folder, tmp_path / "model")
    edit(folder / SCHEDULER, timestep_spacing=spacing)
    assert largest_difference(folder, num_steps=6, sampler=sampler) < 1e-4


def test_steps_offset_of_sdxl_stays(sdxl_folder, tmp_path):
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    edit(folder / SCHEDULER, steps_offset=0)
    assert Schedule.from_config(load_backbone(folder).scheduler_config, 50).timesteps[0] == 980
    assert largest_difference(folder) < 1e-4


@pytest.mark.parametrize(("version", "size"), [("0.8.1", 64), ("0.10.0", 32), ("0.9.0", 32)])
def test_old_default_sample_size_is_that_of_the_pipeline(folder, version, size):
    """F3: before diffusers 0.9, 32 was a default that no model had."""
    edit(folder / "unet/config.json", _diffusers_version=version, sample_size=32)
    backbone = load_backbone(folder, abstract=True)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert backbone.default_resolution == size * backbone.vae_factor
    assert pipe.unet.config.sample_size == size


@pytest.mark.parametrize("kind", ["slow", "fast"])
def test_learned_token_of_several_vectors_is_written_out(folder, kind):
    """F5: as diffusers' pipelines do for textual inversion; the fast tokenizer is F8's."""
    backbone = load_backbone(folder, abstract=True)
    tokenizer = backbone.tokenizers[0]
    words = tokenizer.add_tokens(["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<hat>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = folder / "text_encoder"
    weights = safetensors.torch.load_file(encoder / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    extra = torch.randn(words, weights[name].shape[1], generator=torch.Generator().manual_seed(0))
    weights[name] = torch.cat([weights[name], extra])
    safetensors.torch.save_file(weights, encoder / "model.safetensors", {"format": "pt"})
    edit(encoder / "config.json", vocab_size=len(weights[name]))
    if kind == "fast":
        CLIPTokenizerFast.from_pretrained(folder / "tokenizer").save_pretrained(folder / "fast")
        for file in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
            (folder / "tokenizer" / file).unlink(missing_ok=True)
        shutil.copy(folder / "fast/tokenizer.json", folder / "tokenizer")
        edit(folder / "model_index.json", tokenizer=["transformers", "CLIPTokenizerFast"])
        shutil.rmtree(folder / "fast")
    ids = load_backbone(folder, abstract=True).tokenise(["a <cat-toy> <hat>", "a man"])[0]
    first = tokenizer.convert_tokens_to_ids("<cat-toy>")
    assert ids[0, 2:6].tolist() == [first, first + 1, first + 2, first + 3]
    assert first not in ids[1]
    assert largest_difference(folder, "a <cat-toy> <hat>") < 1e-4


def test_tokenizer_json_alone_gives_the_same_tokens(folder):
    """F8: newer versions of transformers save no other file."""
    prompts = [PROMPT, "a PERSON  and  man", "it's 12 o'c", "person" * 3, "医生", ""]
    before = load_backbone(folder, abstract=True).tokenise(prompts)[0]
    CLIPTokenizerFast.from_pretrained(folder / "tokenizer").save_pretrained(folder / "fast")
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "fast" / file, folder / "tokenizer")
    after = load_backbone(folder, abstract=True).tokenise(prompts)[0]
    np.testing.assert_array_equal(np.delete(before, 4, 0), np.delete(after, 4, 0))
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="the tokenizer is damaged"):
        load_backbone(folder, abstract=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_weights_load(folder, dtype):
    """F9: each weight is the float8's value; large norms and biases as in published files."""
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = {k: v.to(dtype) for k, v in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    kernel = load_backbone(folder).params["unet"]["conv_in"]["kernel"]
    expected = weights["conv_in.weight"].float().permute(2, 3, 1, 0).numpy()
    np.testing.assert_array_equal(kernel, expected)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"conv_in.scale_weight": torch.ones(1)}, "quantised with scales.*conv_in.scale_weight"),
        ({"conv_in.bias": torch.zeros(32, dtype=torch.int8)}, "conv_in.bias is int8"),
    ],
)
def test_quantised_weights_are_refused(folder, extra, message):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file) | extra
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_backbone(folder)


def test_variant_of_some_parts_is_read_as_diffusers_reads_it(folder):
    """F13: parts without it are read from their plain files; a variant of no part is refused."""
    unet = folder / "unet"
    weights = safetensors.torch.load_file(unet / "diffusion_pytorch_model.safetensors")
    changed = {k: 1.1 * v for k, v in weights.items()}
    file = unet / "diffusion_pytorch_model.non_ema.safetensors"
    safetensors.torch.save_file(changed, file, {"format": "pt"})
    assert largest_difference(folder, variant="non_ema") < 1e-4
    plain, other = load_backbone(folder), load_backbone(folder, variant="non_ema")
    assert plain.identity["unet_sha256"] != other.identity["unet_sha256"]
    with pytest.raises(UserError, match=r"missing: unet/diffusion_pytorch_model\.fp16"):
        load_backbone(folder, variant="fp16")


CLASSES = {
    "EDMEulerScheduler": {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 120.0},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "LCMScheduler": {},
    None: {},
}


@pytest.mark.parametrize("name", CLASSES)
def test_other_schedulers_are_refused_by_name(folder, name):
    """F1: noise levels of another kind would be read as DDPM's."""
    edit(folder / SCHEDULER, _class_name=name, **CLASSES[name])
    with pytest.raises(UserError, match=rf"_class_name is {name!r}.* expected"):
        load_backbone(folder, abstract=True)


@pytest.mark.parametrize(
    ("file", "removed", "changes", "message"),
    [
        (SCHEDULER, (), {"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        (SCHEDULER, (), {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        (SCHEDULER, (), {"thresholding": True}, "thresholding is True"),
        (SCHEDULER, (), {"shift": 3.0}, "shift is 3.0, an option that this package does not know"),
        (SCHEDULER, ("beta_start",), {}, "beta_start missing; the noise levels"),
        ("unet/config.json", (), {"gated": True}, "gated is True, an option"),
        ("vae/config.json", (), {"patch_size": 2}, "patch_size is 2, an option"),
        ("text_encoder/config.json", (), {"rope": 1}, "rope is 1, an option"),
        (
            "text_encoder/config.json",
            (),
            {"use_attention_mask": True},
            "use_attention_mask is True",
        ),
    ],
)
def test_options_that_could_change_a_picture_are_refused(folder, file, removed, changes, message):
    """F1, F4, and options of a future release."""
    edit(folder / file, *removed, **changes)
    with pytest.raises(UserError, match=f"{file}: {message}"):
        load_backbone(folder, abstract=True)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {
                "_class_name": "AltDiffusionPipeline",
                "text_encoder": ["alt_diffusion", "RobertaSeriesModelWithTransformation"],
            },
            "AltDiffusionPipeline whose text_encoder is 'RobertaSeries.*not 'CLIPTextModel'",
        ),
        (
            {"_class_name": "IFPipeline", "text_encoder": ["transformers", "T5EncoderModel"]},
            "a IFPipeline whose text_encoder is 'T5EncoderModel'",
        ),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "whose vae is 'AutoencoderTiny'"),
    ],
)
def test_other_families_are_named(folder, index, message):
    """F12"""
    edit(folder / "model_index.json", **index)
    with pytest.raises(UserError, match=message):
        load_backbone(folder, abstract=True)


def test_what_is_no_folder_is_named(folder, tmp_path):
    """F12"""
    shutil.copy(folder / "unet/diffusion_pytorch_model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        load_backbone(folder / "model_index.json")
    with pytest.raises(UserError, match=r"gs://bucket/model.ckpt is on Google Cloud Storage"):
        load_backbone("gs://bucket/model.ckpt")
    with pytest.raises(UserError, match="no such file"):
        load_backbone(tmp_path / "absent.ckpt")
    with pytest.raises(UserError, match="is a web address; give the hub id 'owner/model'"):
        load_backbone("https://huggingface.co/owner/model/tree/main")
    with pytest.raises(UserError, match=r"give the path of the single file in it: model\.safe"):
        load_backbone(tmp_path)


def test_picture_that_is_not_finite_is_an_error_that_names_it(tiny_backbone):
    """F10: the pictures before it are kept."""
    options = SamplerOptions(num_steps=1, batch_size=8)
    params = dict(tiny_backbone.params)
    params["text_encoder"] = jax.tree.map(jnp.array, params["text_encoder"])
    embedding = params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]
    letter = tiny_backbone.tokenise(["z"])[0][0, 1]
    embedding["embedding"] = embedding["embedding"].at[letter].set(np.nan)
    broken = dataclasses.replace(tiny_backbone, params=params)
    found = sample_images(broken, ["a person", "a", "z", "a"], [4, 5, 6, 7], options)
    assert next(found).image.any() and next(found).image.any()
    with pytest.raises(UserError, match=r"image 2 \('z', seed 6\) has values that are not finite"):
        next(found)
