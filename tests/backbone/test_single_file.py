"""Single-file checkpoints: converted once, to what diffusers makes of the same file."""

import importlib.util
import shutil

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from original_layout import single_file
from pipelines import stable_diffusion, stable_diffusion_xl
from test_options import difference_from

import respodiff_jax as rd
from respodiff_jax.backbone import load_backbone
from respodiff_jax.backbone.files import find_pipeline
from respodiff_jax.cli import main
from respodiff_jax.errors import UserError
from respodiff_jax.training.spec import open_model

V1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
V2 = "stabilityai/stable-diffusion-2-1"
XL = "stabilityai/stable-diffusion-xl-base-1.0"
V_PREDICTION = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}


def make(folder, kind):
    """A checkpoint of a kind, and the folder of configs and tokenizers that diffusers uses."""
    if kind == XL:
        pipeline = stable_diffusion_xl(folder, text_layers=10)
    else:
        wide = {"v_prediction": True, "text_width": 1024} if kind == V2 else {}
        pipeline = stable_diffusion(folder, **wide)
    pipeline.save_pretrained(folder / "configs")
    for weights in (folder / "configs").rglob("*.safetensors"):
        weights.unlink()
    return single_file(pipeline, is_open=kind == V2)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("single")
            made[kind] = make(folder, kind), folder / "configs"
        return made[kind]

    return get


@pytest.fixture
def v1(checkpoints, tmp_path):
    """The tensors of a file of SD 1.x, and a cache that has the configs."""
    tensors, configs = checkpoints(V1)
    cache_configs(tmp_path, V1, configs)
    return tensors


def cache_configs(cache, name, configs):
    """As the hub's client keeps them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("a1" * 20)
    shutil.copytree(configs, repository / "snapshots" / ("a1" * 20))
    return repository / "snapshots" / ("a1" * 20)


def saved(tensors, file):
    if file.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 1}, file)
    else:
        safetensors.torch.save_file(tensors, file)
    return file


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers' loader
@pytest.mark.parametrize(
    ("kind", "suffix", "dtype"),
    [
        (V1, ".safetensors", torch.float32),
        (V1, ".ckpt", torch.float16),
        (V2, ".safetensors", torch.float16),
        (XL, ".safetensors", torch.bfloat16),
    ],
)
def test_single_file_draws_what_diffusers_draws(checkpoints, tmp_path, capfd, kind, suffix, dtype):
    tensors, configs = checkpoints(kind)
    cache_configs(tmp_path, kind, configs)
    tensors = {n: x.to(dtype) if x.is_floating_point() else x for n, x in tensors.items()}
    tensors["alphas_cumprod"] = torch.ones(3)  # the original files have it, in float32
    file = saved(tensors, tmp_path / f"model{suffix}")
    files = find_pipeline(str(file), cache_dir=tmp_path)
    printed = capfd.readouterr()
    assert f"converting {file} once, to " in printed.err and printed.err.count("\n") == 1
    assert not printed.out
    assert find_pipeline(str(file), cache_dir=tmp_path) == files and not capfd.readouterr().err

    pipeline = StableDiffusionXLPipeline if kind == XL else StableDiffusionPipeline
    theirs = pipeline.from_single_file(str(file), config=str(configs)).to(torch.float32)
    (index,) = tmp_path.glob("*/model_index.json")
    for weights in index.parent.rglob("*.safetensors"):
        stored = safetensors.torch.load_file(weights).values()
        assert {x.dtype for x in stored if x.is_floating_point()} == {dtype}
    ours = pipeline.from_pretrained(index.parent, torch_dtype=torch.float32)
    assert dict(ours.scheduler.config) == dict(theirs.scheduler.config)
    for part in ("unet", "vae", *(n for n in theirs.components if n.startswith("text_encoder"))):
        expected = getattr(theirs, part).state_dict()
        found = getattr(ours, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], x) for name, x in expected.items())
    if (kind, dtype) == (V1, torch.float32):  # for the other kinds: test_families.py
        sketch = load_backbone(file, cache_dir=tmp_path, abstract=True)
        assert sketch.identity["name"] == str(file)
        assert difference_from(theirs, sketch.loaded()) < 1e-4


def test_a_model_is_a_single_file_wherever_one_is_named(v1, tmp_path, monkeypatch, capsys):
    file = saved(v1, tmp_path / "model.safetensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    command = ["generate", "--model", str(file), "--out", str(tmp_path / "out"), "--prompt", "a"]
    assert main(command) == 2
    assert f"configs and tokenizer of {V1}" in capsys.readouterr().err

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = rd.load_config("configs/smoke.py", model={"name": str(file)})
    assert open_model(config, abstract=True).identity["name"] == str(file)
    assert len(list((tmp_path / "own/respodiff_jax/models").glob("*/model_index.json"))) == 1
    assert rd.load_model(str(file), abstract=True).identity["name"] == str(file)


def test_file_that_says_that_it_predicts_v_does(v1, tmp_path):
    file = saved(v1 | V_PREDICTION, tmp_path / "model.safetensors")
    config = find_pipeline(str(file), cache_dir=tmp_path).scheduler_config
    assert config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"]


def without(prefix):
    return lambda tensors: {n: x for n, x in tensors.items() if not n.startswith(prefix)}


UNET = "model.diffusion_model."
CHANGES = {
    "inpainting": (
        lambda t: t | {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)},
        "is a checkpoint of the kind 'inpainting', expected Stable Diffusion 1.x",
    ),
    "another model": (lambda t: {"lora_up.weight": torch.zeros(2)}, "has no UNet .*a LoRA"),
    "without VAE": (without("first_stage_model."), "cannot be converted: .*AutoencoderKL"),
    "without text": (without("cond_stage_model."), "cannot be converted: .*CLIPTextModel"),
    "without a tensor of the text encoder": (
        without("cond_stage_model.transformer.text_model.final_layer_norm"),
        r"lacks 2 parameters \(text_encoder: text_model.final_layer_norm",
    ),
    "without a tensor": (
        without(f"{UNET}middle_block.1.norm"),
        "cannot be converted: it lacks parameters of the UNet",
    ),
    "integers": (
        lambda t: t | {f"{UNET}out.2.bias": torch.zeros(4, dtype=torch.int8)},
        "is quantised",
    ),
    "scales": (lambda t: t | {f"{UNET}out.2.scale_weight": torch.ones(1)}, "is quantised"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_are_no_whole_model_are_refused(v1, tmp_path, change):
    changed, message = CHANGES[change]
    file = saved(changed(v1), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_backbone(file, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*/model_index.json"))


def test_damaged_and_pickled_files_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x10" * 100)
    with pytest.raises(UserError, match="is damaged"):
        load_backbone(file, cache_dir=tmp_path)
    torch.save({"state_dict": {"callback": Callback()}}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"objects besides tensors.*nothing was run"):
        load_backbone(tmp_path / "model.ckpt", cache_dir=tmp_path)
    with pytest.raises(UserError, match="`variant` is 'fp16', expected neither"):
        load_backbone(file, variant="fp16", cache_dir=tmp_path)


class Callback:
    def __reduce__(self):
        return print, ("run",)


def test_missing_configs_are_named(checkpoints, tmp_path):
    tensors, configs = checkpoints(V1)
    file = saved(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"configs and tokenizer of {V1}, which are not.*hf down"):
        load_backbone(file, cache_dir=tmp_path)
    folder = cache_configs(tmp_path, V1, configs)
    (folder / "tokenizer/merges.txt").unlink()
    with pytest.raises(UserError, match=f"needs tokenizer/merges.txt of {V1}, which the Hugging"):
        load_backbone(file, cache_dir=tmp_path)


@pytest.mark.parametrize("absent", ["torch", "accelerate"])
def test_without_the_extra_the_message_says_so(v1, tmp_path, monkeypatch, absent):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == absent else find(n))
    file = saved(v1, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"converts with {absent}: pip install -e '.\[torch\]'"):
        load_backbone(file, cache_dir=tmp_path)
