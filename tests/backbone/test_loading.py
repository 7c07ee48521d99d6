"""Loading models from folders and hub ids; missing files and unsupported models are refused."""

import hashlib
import json
import logging
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest

from respodiff_jax.backbone import Backbone, load_backbone
from respodiff_jax.backbone.files import find_pipeline
from respodiff_jax.errors import UserError


def _edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _cached(folder, cache, name="owner/small-diffusion", commit="a1" * 20):
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    return name, commit


def test_identity_of_a_folder_is_the_hash_of_its_unet(sd_folder):
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


@pytest.mark.parametrize("is_random", [False, True])
def test_abstract_model_loads_its_weights_later(sd_folder, is_random):
    name, options = ("random/tiny", {"revision": "seed-3"}) if is_random else (str(sd_folder), {})
    expected = load_backbone(name, **options)
    sketch = load_backbone(name, **options, abstract=True)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(sketch.params))
    loaded = sketch.loaded()
    assert loaded.identity == sketch.identity == expected.identity
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)
    assert loaded.loaded() is loaded


def test_offline_hub_model_is_read_from_the_cache(sd_folder, tmp_path, monkeypatch):
    name, commit = _cached(sd_folder, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_backbone(name, cache_dir=tmp_path).identity["name"] == name
    for revision in (None, "main", commit):
        assert find_pipeline(name, cache_dir=tmp_path, revision=revision).revision == commit


def test_hub_model_is_read_from_the_cache_without_a_network(sd_folder, tmp_path, monkeypatch):
    def unreachable(self, *args, **kwargs):
        raise ConnectionError("network is down")

    name, commit = _cached(sd_folder, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    assert find_pipeline(name, cache_dir=tmp_path).revision == commit
    with pytest.raises(UserError, match=r"'owner/other' is neither.*network is down"):
        load_backbone("owner/other", cache_dir=tmp_path)


def test_only_needed_files_are_downloaded(sd_folder, tmp_path, monkeypatch):
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
    with pytest.raises(UserError, match=r"missing: unet/diffusion_pytorch_model.fp16"):
        find_pipeline("owner/model", variant="fp16")
    found = set(asked["allow_patterns"]) & {*here, *half, *unread}
    # The VAE has no such variant, so its plain file is read.
    assert found == {*here, *half} - {w for w in weights if not w.startswith("vae/")}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("owner/absent", {}, "neither a folder nor in the Hugging Face cache.*HF_HUB_OFFLINE"),
        ("./absent/folder/model", {}, "no such folder, and not a hub id"),
        ("/absent/model", {}, "no such folder, and not a hub id"),
        ("random/small", {}, "architecture is 'small', expected one of sd14, sd21"),
        ("random/tiny", {"revision": "main"}, "`revision` is 'main', expected 'seed-0'"),
        (
            "random/tiny",
            {"dtype": "float16"},
            "`dtype` is 'float16', expected one of float32, bfloat16",
        ),
    ],
)
def test_missing_model_is_refused(name, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_backbone(name, cache_dir=tmp_path, **options)


def test_revision_of_a_folder_is_refused(sd_folder):
    with pytest.raises(UserError, match="`revision` is 'main', which applies to hub models"):
        load_backbone(sd_folder, revision="main")


def test_every_missing_file_is_named(sdxl_folder, tmp_path):
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    (folder / "vae" / "config.json").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "tokenizer_2" / "merges.txt").unlink()
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(UserError, match="incomplete") as error:
        load_backbone(folder)
    listed = str(error.value).partition("missing: ")[2].rstrip(".").split("; ")
    assert sorted(listed) == [
        "scheduler/scheduler_config.json",
        "tokenizer_2/merges.txt",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
    ]
    (folder / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"model_index.json is missing"):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not valid JSON"), ("[1]", r"holds \[1\], expected a JSON object")],
)
def test_damaged_config_is_named(sd_folder, tmp_path, content, message):
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    (folder / "vae" / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"vae/config.json {message}"):
        load_backbone(folder)


def test_other_pipeline_classes_are_refused(sd_folder, tmp_path):
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    del index["unet"]
    index |= {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="FluxPipeline without a unet"):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"mid_block_type": None}, "mid_block_type is None, .*'UNetMidBlock2DCrossAttn'"),
        ("unet", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
        ("unet", {"norm_num_groups": 16}, "norm_num_groups is 16"),
        ("unet", {"encoder_hid_dim": 64}, "encoder_hid_dim is 64"),
        ("unet", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ("unet", {"in_channels": 9}, "in_channels is 9, expected the VAE's 4 .*inpainting"),
        ("unet", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, ".*'AttnDownBlock2D'"),
        ("unet", {"down_block_types": None}, "down_block_types is None, .* a list"),
        (
            "unet",
            {"layers_per_block": [1, 2]},
            r"layers_per_block is \[1, 2\], expected one integer",
        ),
        ("unet", {"layers_per_block": 2**31}, "layers_per_block is 2147483648, expected integers"),
        ("unet", {"transformer_layers_per_block": [1, "2"]}, ".* expected integers from 1 to 100"),
        ("unet", {"x" * 999: 1}, "x{60} is 1, an option that this package does not know"),
        ("unet", {"block_out_channels": [32, 48]}, ".* expected a list of multiples of 32"),
        (
            "unet",
            {"block_out_channels": ["32"]},
            r"block_out_channels is \['32'\], expected a list",
        ),
        ("unet", {"cross_attention_dim": 64}, "cross_attention_dim is 64, .* give 32 features"),
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type is 'image'"),
        ("unet", {"addition_embed_type": "text_time"}, r".* has 1 text encoder\(s\)"),
        ("vae", {"shift_factor": 0.1}, "shift_factor is 0.1"),
        ("vae", {"layers_per_block": 10**9}, "layers_per_block is 1000000000, expected"),
        ("vae", {"latent_channels": "4"}, "latent_channels is '4', expected an integer"),
        ("vae", {"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ("text_encoder", {"model_type": "t5"}, "model_type is 't5'"),
        ("text_encoder", {"hidden_size": "a"}, "hidden_size is 'a', expected an integer"),
        ("text_encoder", {"num_hidden_layers": 0}, "num_hidden_layers is 0, expected integers"),
        ("text_encoder", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ("text_encoder", {"hidden_act": ["gelu"]}, r"hidden_act is \['gelu'\]"),
    ],
)
def test_unsupported_options_are_refused(sd_folder, tmp_path, part, changes, message):
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    _edit(folder / part / "config.json", **changes)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"never read")
    with pytest.raises(UserError, match=f"{part}/config.json: {message}"):
        load_backbone(folder)


def test_token_ids_that_nothing_reads_may_be_null(sd_folder, tmp_path):
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    _edit(folder / "text_encoder" / "config.json", bos_token_id=None, pad_token_id=None)
    assert load_backbone(folder, abstract=True).text_encoders


def test_sdxl_refiner_is_refused(sdxl_folder, tmp_path):
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    _edit(folder / "unet" / "config.json", projection_class_embeddings_input_dim=5 * 8 + 24)
    with pytest.raises(UserError, match=r"expected 72 for six time ids.*refiner"):
        load_backbone(folder)


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


def test_loading_needs_no_torch_and_prints_nothing(sd_folder, tmp_path):
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    _edit(folder / "text_encoder" / "config.json", torch_dtype="float16", architectures=["CLIP"])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _WITHOUT_TORCH, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert done.stdout == "(1, 16, 32) False\n", done.stderr
    assert done.stderr == ""


def test_only_the_flax_deprecation_is_silenced():
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
