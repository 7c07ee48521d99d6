"""Backbones with random weights: published architectures to measure, tiny ones to test with."""

import concurrent.futures
import functools
import hashlib
import json

import flax.traverse_util
import jax
import numpy as np

from respodiff_jax.backbone import flax_models
from respodiff_jax.backbone.backbone import Backbone
from respodiff_jax.backbone.text import byte_tokenizer
from respodiff_jax.backbone.weights import aligned_empty
from respodiff_jax.errors import check_choice

_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_SD14 = {"unet": _UNET, "vae": _VAE, "text_encoder": _CLIP_L, "scheduler": _SCHEDULER}
_SD21 = {
    "unet": _UNET
    | {
        "sample_size": 96,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "vae": _VAE | {"sample_size": 768},
    "text_encoder": _CLIP_L
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
    },
    "scheduler": _SCHEDULER | {"prediction_type": "v_prediction"},
}
_SDXL = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "layers_per_block": 2,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": _VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_L
    | {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
    "scheduler": _SCHEDULER,
}

_TINY_TEXT = _CLIP_L | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
    "vocab_size": 514,
}
_TINY = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
    },
    "vae": _VAE
    | {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "sample_size": 16,
    },
    "text_encoder": _TINY_TEXT,
    "scheduler": _SCHEDULER,
}
_TINY_XL = _TINY | {
    "unet": _TINY["unet"]
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "text_encoder_2": _TINY_TEXT | {"hidden_act": "gelu"},
}
_ARCHITECTURES = {
    "sd14": _SD14,
    "sd21": _SD21,
    "sdxl": _SDXL,
    "tiny": _TINY,
    "tiny-v": _TINY | {"scheduler": _SCHEDULER | {"prediction_type": "v_prediction"}},
    "tiny-xl": _TINY_XL,
}


def _random_params(abstract: dict, dtype: np.dtype, rng: np.random.Generator) -> dict:
    """Flax's default initialisation, tensor by tensor: no float32 copy of all of them exists."""
    flat = flax.traverse_util.flatten_dict(abstract)

    def draw(path, rng):
        leaf = flat[path]
        if path[-1] == "bias":
            return np.zeros(leaf.shape, dtype)
        if path[-1] == "scale":
            return np.ones(leaf.shape, dtype)
        deviation = 0.01 if path[-1] == "embedding" else np.prod(leaf.shape[:-1]) ** -0.5
        drawn = aligned_empty(leaf.shape, dtype)
        drawn[...] = deviation * rng.standard_normal(leaf.shape, np.float32)
        return drawn

    # Each large tensor has its own generator, so all cores draw at once.
    large = [path for path, leaf in flat.items() if leaf.size > 2**20]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        drawn = dict(zip(large, pool.map(draw, large, rng.spawn(len(large))), strict=True))
    drawn |= {path: draw(path, rng) for path in flat if path not in drawn}
    return flax.traverse_util.unflatten_dict(drawn)


def random_backbone(
    architecture: str,
    *,
    dtype: str = "float32",
    attention: str = "plain",
    seed: int = 0,
    abstract: bool = False,
) -> Backbone:
    """A backbone with random weights and a byte-level tokenizer; reads no files.

    Args:
      architecture: "sd14", "sd21" (768 pixels, v-prediction) or "sdxl"; or one of the miniatures
        "tiny", "tiny-v" (v-prediction) and "tiny-xl", with 16-pixel images and a mid-block output
        of (4, 4, 64).
      dtype: "float32" or "bfloat16", of all parameters and computation.
      attention: as `Backbone.attention`; this machine need not have it.
      seed: of the weights.
      abstract: `params` are `ShapeDtypeStruct`s and nothing is allocated, for tracing and
        compiling.

    Returns:
      The `Backbone`, named "random/<architecture>" with revision "seed-<seed>".

    Raises:
      UserError: for an unknown architecture or dtype.
    """
    check_choice("architecture", architecture, _ARCHITECTURES)
    kind = flax_models.compute_dtype(dtype)
    configs = dict(_ARCHITECTURES[architecture])
    scheduler_config = dict(configs.pop("scheduler"))
    modules = flax_models.build_modules(configs, kind, f"random/{architecture}")
    encoders = [part for part in modules if part.startswith("text_encoder")]
    rng = np.random.default_rng(seed)
    params = {}
    for part, module in modules.items():
        shapes = flax_models.abstract_params(module)
        if abstract:
            params[part] = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, kind), shapes)
        else:
            params[part] = _random_params(shapes, kind, rng)
    options = {"dtype": dtype, "attention": attention, "seed": seed}
    described = json.dumps({"unet": configs["unet"], "seed": seed}, sort_keys=True)
    return Backbone(
        identity={
            "name": f"random/{architecture}",
            "revision": f"seed-{seed}",
            "variant": None,
            "unet_sha256": hashlib.sha256(described.encode()).hexdigest(),
        },
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoders=tuple(modules[part] for part in encoders),
        tokenizers=tuple(byte_tokenizer() for _ in encoders),
        scheduler_config=scheduler_config,
        params=params,
        dtype=kind,
        zeros_for_empty_prompt=len(encoders) == 2,
        attention=attention,
        load=functools.partial(random_backbone, architecture, **options) if abstract else None,
    )
