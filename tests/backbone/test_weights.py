"""Reading and writing weight files: layouts, variants, shards, old names, damaged files."""

import hashlib
import json
import shutil

import flax.serialization
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from respodiff_jax.backbone import load_backbone, save_weights
from respodiff_jax.backbone.weights import torch_names
from respodiff_jax.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
CLIP = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def expected(sd_folder):
    return load_backbone(sd_folder).params


@pytest.fixture
def folder(sd_folder, tmp_path):
    return shutil.copytree(sd_folder, tmp_path / "model")


def _rewrite(file, change):
    tensors = safetensors.numpy.load_file(file)
    tensors = change(tensors) or tensors
    file.unlink()
    safetensors.numpy.save_file(tensors, file)


def _assert_equal(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


def test_layouts_are_converted(sd_folder, expected):
    unet, vae, clip = (safetensors.numpy.load_file(sd_folder / f) for f in (UNET, VAE, CLIP))
    mid_block = expected["unet"]["mid_block"]
    np.testing.assert_array_equal(
        mid_block["resnets_0"]["conv1"]["kernel"],
        unet["mid_block.resnets.0.conv1.weight"].transpose(2, 3, 1, 0),
    )
    attention = mid_block["attentions_0"]
    np.testing.assert_array_equal(
        attention["proj_in"]["kernel"][0, 0],
        unet["mid_block.attentions.0.proj_in.weight"][..., 0, 0].T,
    )
    np.testing.assert_array_equal(
        attention["transformer_blocks_0"]["attn2"]["to_out_0"]["kernel"],
        unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight"].T,
    )
    np.testing.assert_array_equal(
        expected["unet"]["time_embedding"]["linear_1"]["bias"], unet["time_embedding.linear_1.bias"]
    )
    np.testing.assert_array_equal(
        expected["vae"]["decoder"]["mid_block"]["attentions_0"]["proj_attn"]["kernel"],
        vae["decoder.mid_block.attentions.0.to_out.0.weight"].T,
    )
    embeddings = expected["text_encoder"]["text_model"]["embeddings"]["token_embedding"]
    np.testing.assert_array_equal(
        embeddings["embedding"], clip["text_model.embeddings.token_embedding.weight"]
    )


def test_names_are_converted():
    blocks = ("down_blocks_0", "attentions_1", "transformer_blocks_0")
    assert torch_names((*blocks, "ff", "net_0", "proj", "kernel")) == (
        "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj.weight",
    )
    assert torch_names(("add_embedding", "linear_2", "bias")) == ("add_embedding.linear_2.bias",)
    assert torch_names(("encoder", "mid_block", "attentions_0", "proj_attn", "kernel")) == (
        "encoder.mid_block.attentions.0.to_out.0.weight",
        "encoder.mid_block.attentions.0.proj_attn.weight",
    )
    assert torch_names(("text_model", "encoder", "layers", "3", "layer_norm1", "scale")) == (
        "text_model.encoder.layers.3.layer_norm1.weight",
    )


def test_parameters_are_cast_and_contiguous(sd_folder, expected):
    loaded = load_backbone(sd_folder, dtype="bfloat16").params
    for leaf, exact in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == ml_dtypes.bfloat16 and leaf.flags.c_contiguous
        np.testing.assert_array_equal(leaf, exact.astype(ml_dtypes.bfloat16))


def _save_halved(folder):
    for name in (UNET, VAE, CLIP):
        file = folder / name
        tensors = safetensors.numpy.load_file(file)
        half = {k: v.astype(np.float16) for k, v in tensors.items()}
        safetensors.numpy.save_file(half, file.with_suffix(".fp16.safetensors"))


def test_fp16_files_are_a_variant_and_the_fallback(folder, expected):
    _save_halved(folder)
    halved = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), expected)
    _assert_equal(load_backbone(folder, variant="fp16").params, halved)
    _assert_equal(load_backbone(folder).params, expected)
    for name in (UNET, VAE, CLIP):
        (folder / name).unlink()
    backbone = load_backbone(folder)
    _assert_equal(backbone.params, halved)
    file = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    assert backbone.identity["unet_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights_load(sd_folder, expected, tmp_path, variant):
    pipeline = DiffusionPipeline.from_pretrained(
        sd_folder, torch_dtype=torch.float16 if variant else torch.float32
    )
    size = "500KB" if variant else "1MB"
    pipeline.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    shards = sorted((tmp_path / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    backbone = load_backbone(tmp_path, variant=variant)
    if variant:
        expected = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), expected)
    _assert_equal(backbone.params, expected)
    joined = b"".join(shard.read_bytes() for shard in shards)
    assert backbone.identity["unet_sha256"] == hashlib.sha256(joined).hexdigest()

    shards[1].unlink()
    with pytest.raises(UserError, match=f"missing: unet/{shards[1].name}"):
        load_backbone(tmp_path, variant=variant)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"conv_in.weight": 1}])
def test_damaged_index_is_named(folder, weight_map):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model-00001-of-00001.safetensors")
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"safetensors.index.json is not an index"):
        load_backbone(folder)


def test_msgpack_weights_load_and_damaged_ones_are_named(folder, expected):
    for part, file in (("unet", UNET), ("vae", VAE), ("text_encoder", CLIP)):
        stem = "flax_model" if part == "text_encoder" else "diffusion_flax_model"
        (folder / file).unlink()
        content = flax.serialization.to_bytes(expected[part])
        (folder / part / f"{stem}.msgpack").write_bytes(content)
    _assert_equal(load_backbone(folder).params, expected)
    assert (
        load_backbone(folder, dtype="bfloat16").params["unet"]["conv_in"]["bias"].dtype.name
        == "bfloat16"
    )
    file = folder / "unet" / "diffusion_flax_model.msgpack"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"diffusion_flax_model.msgpack is truncated"):
        load_backbone(folder)
    tree = jax.tree.map(np.asarray, expected["unet"])
    tree["conv_in"] = {"kernel": tree["conv_in"]["kernel"][:1], "other": np.zeros(3)}
    file.write_bytes(flax.serialization.to_bytes(tree))
    with pytest.raises(
        UserError, match=r"lacks .* 1 \(conv_in/bias\).*unknown ones: 1 \(conv_in/other"
    ):
        load_backbone(folder)


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_attention_names_of_the_vae_load(folder, expected, as_convolution):
    olds = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }

    def rename(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for new, old in olds.items():
                if new in name:
                    name = name.replace(new, old)
                    if as_convolution and tensor.ndim == 2:
                        tensor = tensor[:, :, None, None]
            renamed[name] = tensor
        assert sum(".proj_attn." in name for name in renamed) == 4
        return renamed

    _rewrite(folder / VAE, rename)
    _assert_equal(load_backbone(folder).params, expected)


def test_linear_weights_load_into_a_convolution(folder, expected):
    name = "mid_block.attentions.0.proj_in.weight"
    _rewrite(folder / UNET, lambda t: t | {name: t[name][:, :, 0, 0].copy()})
    _assert_equal(load_backbone(folder).params, expected)


def test_position_ids_in_old_files_are_ignored(folder, expected):
    name = "text_model.embeddings.position_ids"
    _rewrite(folder / CLIP, lambda t: t | {name: np.arange(16)[None]})
    _assert_equal(load_backbone(folder).params, expected)


def test_bfloat16_files_load(folder, expected):
    _rewrite(folder / UNET, lambda t: {k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()})
    rounded = jax.tree.map(
        lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), expected["unet"]
    )
    _assert_equal(load_backbone(folder).params["unet"], rounded)


def test_missing_and_unknown_parameters_are_listed(folder):
    def change(tensors):
        for i in range(2):
            tensors[f"other.{i}"] = tensors.pop(f"mid_block.resnets.{i}.conv1.weight")
        return {k: v for k, v in tensors.items() if not k.startswith("up_blocks.0.resnets.0.")}

    _rewrite(folder / UNET, change)
    with pytest.raises(UserError, match=r"lacks parameters") as error:
        load_backbone(folder)
    message = str(error.value)
    assert str(folder / UNET) in message
    assert "14 (mid_block.resnets.0.conv1.weight, mid_block.resnets.1.conv1.weight," in message
    assert "and 9 more); it holds unknown ones: 2 (other.0, other.1)" in message


def test_unknown_parameters_alone_give_a_warning(folder, expected):
    _rewrite(folder / UNET, lambda t: t | {"lora.down.weight": np.zeros((2, 2), np.float32)})
    with pytest.warns(UserWarning, match=r"ignores: 1 \(lora.down.weight\)"):
        loaded = load_backbone(folder)
    _assert_equal(loaded.params, expected)


def test_wrong_shape_is_named_with_file_and_parameter(folder):
    name = "mid_block.resnets.0.conv1.weight"
    _rewrite(folder / UNET, lambda t: t | {name: t[name][:-1].copy()})
    with pytest.raises(UserError, match=f"{UNET}: {name} has shape .3, 3, 64, 63.*.3, 3, 64, 64."):
        load_backbone(folder)


@pytest.mark.parametrize("keep", [0, 5, 1000, -8])
def test_truncated_file_is_named(folder, keep):
    content = (folder / VAE).read_bytes()
    (folder / VAE).write_bytes(content[:keep])
    with pytest.raises(UserError, match=f"{VAE} is truncated or not a safetensors file"):
        load_backbone(folder)


def test_pickled_weights_are_refused_with_the_conversion(folder):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"only the pickled diffusion_pytorch_model.bin; convert"):
        load_backbone(folder)


def test_absent_variant_is_refused_with_the_existing_files(folder):
    with pytest.raises(UserError, match=r"there is diffusion_pytorch_model.safetensors"):
        load_backbone(folder, variant="fp16")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saved_weights_load_in_pytorch_and_in_flax(sd_folder, folder, expected, dtype):
    kinds = {
        "unet": (UNET, UNet2DConditionModel),
        "vae": (VAE, AutoencoderKL),
        "text_encoder": (CLIP, CLIPTextModel),
    }
    for part, (file, model) in kinds.items():
        (folder / file).unlink()
        save_weights(expected[part], folder / file, dtype)
        saved = model.from_pretrained(folder / part).state_dict()
        original = model.from_pretrained(sd_folder / part).state_dict()
        assert saved.keys() == original.keys()
        for name, tensor in original.items():
            rounded = tensor.to(getattr(torch, dtype)).to(saved[name].dtype)
            torch.testing.assert_close(saved[name], rounded, rtol=0, atol=0)
    kind = np.dtype(dtype)
    _assert_equal(
        load_backbone(folder).params,
        jax.tree.map(lambda x: x.astype(kind).astype(np.float32), expected),
    )
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
