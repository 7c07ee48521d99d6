"""Models of the published sizes: equal to PyTorch part by part, and trained within the memory.

pip install --no-deps open_clip_torch
pytest -m slow tests/backbone/test_full_size.py -s

The weights are random, in fp16 files as published; the vocabulary is CLIP's. One part is in memory
at a time, so 15 GiB suffice.
"""

import dataclasses
import gc
import gzip
import importlib.util
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from respodiff_jax.backbone import Conditioning, load_backbone
from respodiff_jax.backbone.architectures import _ARCHITECTURES
from respodiff_jax.backbone.files import find_pipeline
from respodiff_jax.backbone.text import byte_symbols
from respodiff_jax.backbone.weights import load_weights
from respodiff_jax.data import contrast
from respodiff_jax.method import GENDER
from respodiff_jax.method.reading import Decision, decide, scores
from respodiff_jax.training.reading import contrast_prompts, fit_reading

OPEN_CLIP = importlib.util.find_spec("open_clip")
REPOSITORY = pathlib.Path(__file__).parents[2]
PROMPTS = ["a photo of a café owner, naïve", "(a doctor:1.3) 医生", "it's 12 o'clock 👍", ""]
MODULES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        OPEN_CLIP is None, reason="CLIP's vocabulary: pip install --no-deps open_clip_torch"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of torch, on half precision
]


def clip_tokenizer(folder):
    """The published tokenizer, from the merges that open_clip carries."""
    file = pathlib.Path(OPEN_CLIP.submodule_search_locations[0], "bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    vocabulary = [*byte_symbols(), *(merge.replace(" ", "") for merge in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    assert len(vocabulary) == 49408
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(*files, model_max_length=77)


def write_model(folder, architecture):
    """A diffusers folder of PyTorch's modules in fp16, made one after the other."""
    configs = dict(_ARCHITECTURES[architecture])
    DDIMScheduler.from_config(configs.pop("scheduler")).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        for part, config in configs.items():
            is_text = part.startswith("text")
            config = (CLIPTextConfig(**config),) if is_text else config
            module = MODULES[part](*config) if is_text else MODULES[part](**config)
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.ndim == 1:  # zeros and ones would hide a mix-up
                        parameter += 0.05 * torch.randn_like(parameter)
            module.save_pretrained(folder / part)
            index[part] = ["transformers" if is_text else "diffusers", MODULES[part].__name__]
            del module
            gc.collect()
    finally:
        torch.set_default_dtype(torch.float32)
    for part in [part for part in configs if part.startswith("text_encoder")]:
        name = part.replace("text_encoder", "tokenizer")
        clip_tokenizer(folder / f"{name}_files").save_pretrained(folder / name)
        shutil.rmtree(folder / f"{name}_files")
        index[name] = ["transformers", "CLIPTokenizer"]
    if "text_encoder_2" in configs:
        index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module", params=["sd14", "sd21", "sdxl"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    yield write_model(folder, request.param)
    shutil.rmtree(folder)


def in_torch(folder, part, function):
    """What a function computes of a part in float32, which is then given up."""
    module = MODULES[part].from_pretrained(folder / part, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        return function(module)


def with_part(folder, *parts):
    """The model here with only these parts' weights, in float32."""
    sketch, files = load_backbone(folder, abstract=True), find_pipeline(str(folder))
    params = {
        part: load_weights(files.weights[part], sketch.params[part], np.dtype("float32"))
        for part in parts
    }
    return dataclasses.replace(sketch, params=params, load=None)


def difference(ours, theirs):
    gc.collect()
    theirs = theirs.numpy()
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_unet_is_pytorchs(folder):
    config = json.loads((folder / "unet/config.json").read_text())
    z, timesteps = normal(1, 4, 32, 32), torch.tensor([501])
    context = normal(1, 77, config["cross_attention_dim"])
    pooled, time_ids, added = None, None, {}
    if config["addition_embed_type"] == "text_time":
        pooled, time_ids = normal(1, 1280), torch.tensor([[256.0, 256, 0, 0, 256, 256]])
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
    theirs = nhwc(in_torch(folder, "unet", lambda u: u(z, timesteps, context, **added).sample))
    backbone = with_part(folder, "unet")
    arrays = [None if x is None else jnp.asarray(x.numpy()) for x in (context, pooled, time_ids)]

    @jax.jit
    def ours(params, z, timesteps, cond):
        return backbone.decode(params, *backbone.encode(params, z, timesteps, cond))

    z = jnp.asarray(nhwc(z).numpy())
    found = ours(backbone.params, z, jnp.array([501], jnp.int32), Conditioning(*arrays))
    relative = difference(found, theirs)
    print(f"\n{folder.name} UNet {relative:.1e}")
    assert relative < 1e-4


def test_text_states_are_pytorchs(folder):
    parts = sorted(part.name for part in folder.glob("text_encoder*"))
    theirs, pooled = [], None
    for part in parts:
        tokenizer = CLIPTokenizer.from_pretrained(
            folder / part.replace("text_encoder", "tokenizer")
        )
        ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
        out = in_torch(folder, part, lambda m, ids=ids: m(ids, output_hidden_states=True))
        theirs.append(out.last_hidden_state if len(parts) == 1 else out.hidden_states[-2])
        pooled = out[0] if part == "text_encoder_2" else pooled
    cond = with_part(folder, *parts).encode_prompts(PROMPTS, 512)
    # With two encoders the empty prompt is zeros here, as in diffusers' pipeline.
    kept = slice(len(PROMPTS) - (len(parts) == 2))
    relative = difference(cond.context[kept], torch.cat(theirs, -1)[kept])
    print(f"\n{folder.name} text {relative:.1e}")
    assert relative < 1e-4
    assert pooled is None or difference(cond.pooled[kept], pooled[kept]) < 1e-4


def test_decoded_pictures_are_pytorchs(folder):
    z = normal(1, 4, 32, 32)
    factor = json.loads((folder / "vae/config.json").read_text())["scaling_factor"]
    theirs = nhwc(in_torch(folder, "vae", lambda vae: vae.decode(z / factor).sample / 2 + 0.5))
    backbone = with_part(folder, "vae")
    found = jax.jit(backbone.decode_latents)(backbone.params, jnp.asarray(nhwc(z).numpy()))
    relative = difference(found, theirs.clamp(0, 1))
    print(f"\n{folder.name} VAE {relative:.1e}")
    assert relative < 1e-4


def command(*args):
    """Runs `respodiff`; prints its time and the largest memory of all commands until now."""
    start = time.perf_counter()
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "respodiff_jax", *map(str, args)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\n{args[0]}: {time.perf_counter() - start:.0f} s, at most {peak:.1f} GiB")
    assert done.returncode == 0, done.stderr[-2000:]
    return peak


def test_reading_finds_words_with_the_published_vocabulary(tmp_path):
    """Random weights know no word's meaning, but keep which words a prompt has."""
    tokenizer = clip_tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(**_ARCHITECTURES["sd14"]["text_encoder"])).eval()

    def encode(prompts):
        batches = [prompts[i : i + 64] for i in range(0, len(prompts), 64)]
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        with torch.no_grad():
            states = [encoder(tokenizer(b, **options).input_ids)[0].numpy() for b in batches]
        return np.concatenate(states)

    phrases = contrast.PEOPLE, contrast.ADJECTIVES, contrast.THINGS
    prompts = contrast_prompts(list(GENDER.values()), *phrases, contrast.TEMPLATES)
    heads, accuracy = fit_reading(encode, prompts)
    print("held-out AUROC", {name: round(value, 3) for name, value in accuracy.items()})
    assert accuracy["value"] > 0.95
    unseen = ("baker", "lawyer", "nurse", "tailor", "carpenter", "librarian", "cashier", "clerk")
    assert not {*unseen} & {*contrast.PEOPLE}
    named = [f"a picture of a {word} {job}" for job in unseen for word in ("woman", "man")]
    assert Decision.OPEN not in decide(np.asarray(scores(heads, encode(named))))


def test_sd15_is_trained_exported_and_drawn_within_14_gib(tmp_path):
    """The config as shipped, but for the number of steps and the grid: 512 pixels, two concepts."""
    folder = write_model(tmp_path / "model", "sd14")
    few = {"train.steps": 2, "log.grid_images": 1, "log.grid_steps": 2}
    options = [f"--config.{name}={value}" for name, value in few.items()]
    run, model = ("--workdir", tmp_path / "run"), f"--config.model.name={folder}"
    assert command("train", "--config", "configs/sd14_gender.py", *run, model, *options) < 14
    command("export", tmp_path / "run", "--out", tmp_path / "adapter")
    drawn = ("--prompt", "a doctor", "--steps", 2, "--out", tmp_path / "pictures")
    draw = ("generate", "--adapter", tmp_path / "adapter", "--model", folder, "--fair", "gender")
    assert command(*draw, *drawn) < 14
    assert len(list((tmp_path / "pictures/images").glob("*.png"))) == 1

    sys.path.insert(0, str(tmp_path / "adapter"))
    from torch_adapter import RespoDiffAdapter

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    adapter = RespoDiffAdapter.from_pretrained(tmp_path / "adapter").attach(pipe)
    adapter.set_concepts({"a woman": 1.0})
    picture = pipe("a doctor", num_inference_steps=2).images[0]
    assert np.std(picture) > 0
