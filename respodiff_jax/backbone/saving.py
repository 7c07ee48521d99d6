"""Saves a `Backbone` as a diffusers folder, for `load_backbone` and PyTorch's diffusers."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import diffusers

from respodiff_jax.backbone.backbone import Backbone
from respodiff_jax.backbone.weights import save_weights

_FLAX_ONLY = ("_use_default_values", "split_head_dim", "use_memory_efficient_attention")


def _write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_backbone(backbone: Backbone, folder: str | pathlib.Path, dtype: str = "float32") -> None:
    """Writes a Stable Diffusion pipeline as a diffusers folder.

    Args:
      backbone: what to write.
      folder: created if it does not exist; existing files are overwritten.
      dtype: "float32", "float16" or "bfloat16", of the weight files.
    """
    folder = pathlib.Path(folder)
    params = backbone.params
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", backbone.scheduler_config.get("_class_name", "DDIMScheduler")],
    }
    for part in ("unet", "vae"):
        config = {k: v for k, v in getattr(backbone, part).config.items() if k not in _FLAX_ONLY}
        _write_json(folder / part / "config.json", config | {"_class_name": index[part][1]})
        save_weights(params[part], folder / part / "diffusion_pytorch_model.safetensors", dtype)

    for i, (module, tokenizer) in enumerate(
        zip(backbone.text_encoders, backbone.tokenizers, strict=True)
    ):
        suffix, model = ("_2", "CLIPTextModelWithProjection") if i else ("", "CLIPTextModel")
        index[f"text_encoder{suffix}"] = ["transformers", model]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
        part = folder / f"text_encoder{suffix}"
        # Without a dtype, transformers 5 computes in that of the files, diffusers in float32.
        added = {"architectures": [model], "dtype": "float32"}
        _write_json(part / "config.json", module.config.to_diff_dict() | added)
        save_weights(params[f"text_encoder{suffix}"], part / "model.safetensors", dtype)
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")

    if len(backbone.text_encoders) == 2:
        index["_class_name"] = "StableDiffusionXLPipeline"
        index["force_zeros_for_empty_prompt"] = backbone.zeros_for_empty_prompt
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index["requires_safety_checker"] = False
    _write_json(folder / "scheduler" / "scheduler_config.json", backbone.scheduler_config)
    _write_json(folder / "model_index.json", index)
