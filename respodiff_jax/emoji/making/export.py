"""Writes the trained parts as a float16 diffusers folder, with evaluator (`clip/`) and suite."""

import pathlib

import numpy as np
import transformers

from respodiff_jax.backbone import Backbone, save_backbone, save_clip
from respodiff_jax.backbone.flax_models import build_modules
from respodiff_jax.emoji.making import autoencoder, clip, denoiser
from respodiff_jax.emoji.making.suite import write_suite


def export(folder, tokenizer, clip_params, vae_params, unet_params, scaling_factor):
    """Writes a folder for `load_backbone` and PyTorch's `StableDiffusionPipeline.from_pretrained`.

    The folder is created if missing; files in it are overwritten. `scaling_factor` is 1 / standard
    deviation of the autoencoder's latents.
    """
    folder = pathlib.Path(folder)
    config = clip.config(tokenizer)
    configs = {
        "unet": denoiser.CONFIG,
        "vae": autoencoder.CONFIG | {"scaling_factor": scaling_factor},
        "text_encoder": config.text_config.to_dict(),
    }
    modules = build_modules(configs, np.dtype("float32"), "Emoji World")
    backbone = Backbone(
        identity={"name": "emoji-world", "revision": None, "unet_sha256": None},
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoders=(modules["text_encoder"],),
        tokenizers=(tokenizer,),
        scheduler_config=denoiser.SCHEDULER,
        params={
            "unet": unet_params,
            "vae": vae_params,
            "text_encoder": {"text_model": clip_params["text_model"]},
        },
        dtype=np.dtype("float32"),
    )
    save_backbone(backbone, folder, dtype="float16")
    export_clip(folder, tokenizer, clip_params)
    write_suite(folder)


def export_clip(folder, tokenizer, params):
    """Writes the evaluator, `clip/` of a diffusers folder."""
    processor = transformers.CLIPImageProcessor(
        do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    save_clip(pathlib.Path(folder) / "clip", clip.config(tokenizer), params, tokenizer, processor)
