"""The frozen model: parity with PyTorch, with the stock Flax UNet, and every refusal."""

import hashlib
import json
import logging
import pathlib
import shutil
import subprocess
import sys

import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from respodiff_jax.backbone import (
    Backbone,
    Conditioning,
    load_backbone,
    random_backbone,
    save_backbone,
)
from respodiff_jax.backbone.files import find_pipeline
from respodiff_jax.backbone.flax_models import as_trained

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


def _stock(backbone, params, z, timesteps, cond):
    added = None
    if cond.pooled is not None:
        added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}

    def apply(params, z):
        z_nchw = jnp.moveaxis(z, -1, 1)
        with nn.intercept_methods(as_trained):
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
def test_decode_of_encode_is_the_stock_unet_bit_for_bit(pair):
    backbone, _ = pair
    inputs = _inputs(backbone)
    h, skips = jax.jit(backbone.encode)(backbone.params, *inputs)
    eps = jax.jit(backbone.decode)(backbone.params, h, skips)
    np.testing.assert_array_equal(eps, _stock(backbone, backbone.params, *inputs))


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
    # What is added is fp32, as the adapters are.
    eps = jax.jit(rounded.decode)(rounded.params, h.astype(jnp.float32), skips)
    assert eps.dtype == jnp.float32

    h, skips = jax.jit(exact.encode)(exact.params, *_inputs(exact))
    expected = jax.jit(exact.decode)(exact.params, h, skips)
    assert 0 < np.abs(eps - expected).max() < 0.05 * np.abs(expected).max()


def test_prompts_equal_pytorch(pair):
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


def test_empty_prompt_of_sdxl_is_no_negative_prompt(sdxl_folder, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(sdxl_folder)
    with torch.no_grad():
        _, negative, _, negative_pooled = pipeline.encode_prompt("a man", device="cpu")
    cond = load_backbone(sdxl_folder).encode_prompts([""], 16)
    np.testing.assert_array_equal(cond.context, negative)
    np.testing.assert_array_equal(cond.pooled, negative_pooled)

    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    _edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        _, negative, _, negative_pooled = pipeline.encode_prompt("a man", device="cpu")
    cond = load_backbone(folder).encode_prompts([""], 16)
    assert np.std(negative.numpy()) > 0.1
    np.testing.assert_allclose(cond.context, negative, atol=1e-4, rtol=0)
    np.testing.assert_allclose(cond.pooled, negative_pooled, atol=1e-4, rtol=0)


def test_images_equal_pytorch(pair):
    backbone, pipeline = pair
    z = 0.3 * jax.random.normal(jax.random.key(3), (2, *backbone.latent_shape(16)))
    with torch.no_grad():
        decoded = pipeline.vae.decode(_nchw(z) / pipeline.vae.config.scaling_factor).sample
        expected = pipeline.image_processor.postprocess(decoded, output_type="np")
    images = jax.jit(backbone.decode_latents)(backbone.params, z)
    assert images.shape == (2, 16, 16, 3) and images.dtype == jnp.float32
    assert np.mean((expected > 0) & (expected < 1)) > 0.3
    np.testing.assert_allclose(images, expected, atol=1e-4, rtol=0)


def test_prompt_over_the_limit_warns_with_the_lost_text(sd_folder):
    backbone = load_backbone(sd_folder)
    prompt = "woman " * 14 + "man person"
    with pytest.warns(UserWarning, match=r"has 18 tokens, .* reads 16; not read: 'man person ?'"):
        long = backbone.encode_prompts([prompt], 16)
    short = backbone.encode_prompts(["woman " * 14], 16)
    np.testing.assert_array_equal(long.context, short.context)


@pytest.mark.parametrize("prompts", ["a man", [], [None], ["a man", 3]])
def test_prompts_must_be_strings(prompts):
    with pytest.raises(ValueError, match="non-empty sequence of strings"):
        random_backbone("tiny").encode_prompts(prompts, 16)


@pytest.mark.parametrize(
    ("architecture", "resolution", "latent", "mid_block", "unet_params"),
    [
        ("sd14", 512, (64, 64, 4), (8, 8, 1280), 859_520_964),
        ("sd21", 768, (96, 96, 4), (12, 12, 1280), 865_910_724),
        ("sdxl", 1024, (128, 128, 4), (32, 32, 1280), 2_567_463_684),
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


def test_random_backbone_depends_on_the_seed_alone():
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
def test_resolution_that_does_not_fit_names_the_nearest(resolution, nearest):
    backbone = random_backbone("tiny", abstract=True)
    with pytest.raises(ValueError, match=rf"multiple of 4 pixels.*{nearest}"):
        backbone.latent_shape(resolution)
    with pytest.raises(ValueError, match=nearest):
        backbone.encode_prompts(["a man"], resolution)


def test_inputs_of_a_wrong_shape_are_named():
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
        ("z", (2, 4, 8, 8), "z_t must be .B, h, w, 4., channels last"),
        ("t", (1,), "timesteps must be .2. for 2 latents, got .1,."),
        ("t", (), "timesteps must be"),
        ("context", (77, 64), "cond.context must be"),
        ("context", (1, 77, 64), "cond.context must be"),
        ("pooled", (3, 32), "cond.pooled must be"),
        ("time_ids", (2, 5), "cond.time_ids must be .2, 6."),
    ]:
        with pytest.raises(ValueError, match=message):
            encode(**{name: shape(bad, jnp.float32)})
    with pytest.raises(ValueError, match=r"SDXL needs cond.pooled"):
        encode(pooled=None)


# --- where models come from -------------------------------------------------------------------


def _edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _cached(folder, cache, name="owner/small-diffusion", commit="a1" * 20):
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    return name, commit


def test_folder_identity_is_the_hash_of_the_unet_file(sd_folder):
    backbone = load_backbone(str(sd_folder))
    assert isinstance(backbone, Backbone)
    file = sd_folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert backbone.identity == {
        "name": str(sd_folder),
        "revision": None,
        "variant": None,
        "unet_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert json.loads(json.dumps(backbone.identity)) == backbone.identity
    assert backbone.scheduler_config["prediction_type"] == "epsilon"


def test_hub_id_offline_is_taken_from_the_cache(sd_folder, tmp_path, monkeypatch):
    name, commit = _cached(sd_folder, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_backbone(name, cache_dir=tmp_path).identity["name"] == name
    for revision in (None, "main", commit):
        assert find_pipeline(name, cache_dir=tmp_path, revision=revision).revision == commit


def test_hub_id_without_a_network_is_taken_from_the_cache(sd_folder, tmp_path, monkeypatch):
    def unreachable(self, *args, **kwargs):
        raise ConnectionError("network is down")

    name, commit = _cached(sd_folder, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    assert find_pipeline(name, cache_dir=tmp_path).revision == commit
    with pytest.raises(ValueError, match=r"'owner/other' is neither.*network is down"):
        load_backbone("owner/other", cache_dir=tmp_path)


def test_hub_id_fetches_only_what_is_read(sd_folder, tmp_path, monkeypatch):
    here = [str(f.relative_to(sd_folder)) for f in sd_folder.rglob("*") if f.is_file()]
    half = [f.replace(".safetensors", ".fp16.safetensors") for f in here]
    half = [f for f in half if ".fp16." in f and not f.startswith("vae/")]
    unread = ["README.md", "v1-4.ckpt", "unet/diffusion_pytorch_model.bin"]
    unread += ["unet/diffusion_flax_model.msgpack", "safety_checker/model.safetensors"]
    asked = {}

    def download(name, **kwargs):
        asked.update(kwargs)
        return str(sd_folder)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda *a, **k: here + half + unread
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    weights = {f for f in here if f.endswith(".safetensors")}
    assert len(weights) == 3 and len(half) == 2
    find_pipeline("owner/model")
    assert asked["local_files_only"] is False
    found = set(asked["allow_patterns"]) & {*here, *half, *unread}
    assert found == set(here)
    with pytest.raises(ValueError, match=r"missing: unet/diffusion_pytorch_model.fp16"):
        find_pipeline("owner/model", variant="fp16")
    found = set(asked["allow_patterns"]) & {*here, *half, *unread}
    assert found == {*here, *half} - weights


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("owner/absent", {}, "neither a folder nor in the Hugging Face cache.*HF_HUB_OFFLINE"),
        ("./absent/folder/model", {}, "no such folder, and not a hub id"),
        ("/absent/model", {}, "no such folder, and not a hub id"),
        ("random/small", {}, "unknown architecture 'small'; expected one of sd14, sd21"),
        ("random/tiny", {"revision": "main"}, "revision='main'.*expected 'seed-0'"),
        ("random/tiny", {"dtype": "float16"}, "dtype='float16': expected 'float32' or 'bfloat16'"),
    ],
)
def test_model_that_is_not_there(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_backbone(name, cache_dir=tmp_path, **options)


def test_revision_of_a_folder_is_refused(sd_folder):
    with pytest.raises(ValueError, match="revision='main' applies to hub models"):
        load_backbone(sd_folder, revision="main")


def test_incomplete_model_names_every_missing_file(sdxl_folder, tmp_path):
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    (folder / "vae" / "config.json").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "tokenizer_2" / "merges.txt").unlink()
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ValueError, match="incomplete") as error:
        load_backbone(folder)
    listed = str(error.value).partition("missing: ")[2].rstrip(".").split("; ")
    assert sorted(listed) == [
        "scheduler/scheduler_config.json",
        "tokenizer_2/merges.txt",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
    ]
    (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"model_index.json is missing"):
        load_backbone(folder)


def test_damaged_config_is_named(sd_folder, tmp_path):
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"vae/config.json is not valid JSON"):
        load_backbone(folder)


def test_other_kinds_of_pipelines_are_refused(sd_folder, tmp_path):
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    del index["unet"]
    index |= {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="FluxPipeline without a unet"):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"mid_block_type": None}, "mid_block_type=None .*'UNetMidBlock2DCrossAttn'"),
        ("unet", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D'"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
        ("unet", {"norm_num_groups": 16}, "norm_num_groups=16"),
        ("unet", {"encoder_hid_dim": 64}, "encoder_hid_dim=64"),
        ("unet", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ("unet", {"in_channels": 9}, "in_channels=9, expected the VAE's 4 .*Inpainting"),
        ("unet", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "'AttnDownBlock2D'"),
        ("unet", {"layers_per_block": [1, 2]}, r"layers_per_block must be one integer"),
        ("unet", {"block_out_channels": [32, 48]}, "multiples of the 32"),
        ("unet", {"cross_attention_dim": 64}, "give 32 features, .* is 64"),
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ("unet", {"addition_embed_type": "text_time"}, r"1 text encoder\(s\) for a unet"),
        ("vae", {"shift_factor": 0.1}, "shift_factor=0.1"),
        ("vae", {"mid_block_add_attention": False}, "mid_block_add_attention=False"),
        ("text_encoder", {"model_type": "t5"}, "model_type='t5'"),
        ("text_encoder", {"hidden_act": "mish"}, "hidden_act='mish'"),
    ],
)
def test_options_that_flax_would_ignore_are_refused(sd_folder, tmp_path, part, changes, message):
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    _edit(folder / part / "config.json", **changes)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"never read")
    with pytest.raises(ValueError, match=message):
        load_backbone(folder)


def test_sdxl_refiner_is_refused(sdxl_folder, tmp_path):
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    _edit(folder / "unet" / "config.json", projection_class_embeddings_input_dim=5 * 8 + 24)
    with pytest.raises(ValueError, match=r"expected 72 for six time ids.*refiner"):
        load_backbone(folder)


# --- the environment --------------------------------------------------------------------------

_WITHOUT_TORCH = """
import importlib.machinery as machinery, sys
find_spec = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = lambda name, *rest: (
    None if name.split(".")[0] == "torch" else find_spec(name, *rest)
)
from respodiff_jax.backbone import load_backbone
backbone = load_backbone(sys.argv[1])
print(backbone.encode_prompts(["a man"], 16).context.shape, "torch" in sys.modules)
"""


def test_loads_without_torch_and_in_silence(sd_folder, tmp_path):
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    _edit(folder / "text_encoder" / "config.json", torch_dtype="float16", architectures=["CLIP"])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _WITHOUT_TORCH, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert done.stdout == "(1, 16, 32) False\n", done.stderr
    assert done.stderr == ""


def test_only_the_deprecation_of_flax_is_silenced():
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger("diffusers.models.vae_flax")
    logger.addHandler(handler)
    try:
        logger.warning("Flax classes are deprecated and will be removed in Diffusers v0.40.0.")
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert seen == ["something else"]
