"""Small random PyTorch pipelines, to compare the Flax backbone with."""

import json
import pathlib

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

MERGES = ("p e", "r s", "rs o", "pe rso", "perso n</w>", "a n</w>", "m an</w>", "w o", "wo man</w>")
LIMIT = 16


def tokenizer(folder: pathlib.Path, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer with tokens for "person", "man" and "woman", and for single letters."""
    folder.mkdir(parents=True)
    letters = sorted(ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in MERGES]
    vocabulary = [
        *letters,
        *(x + "</w>" for x in letters),
        *merged,
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=LIMIT,
        pad_token=pad_token,
    )


def _text_config(**changes) -> CLIPTextConfig:
    # The published Stable Diffusion configs have eos_token_id=2, for which transformers takes the
    # highest id; the vocabulary's real end token is 522.
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 24,
        "vocab_size": 523,
        "max_position_embeddings": LIMIT,
        "bos_token_id": 0,
        "eos_token_id": 2,
        # With the default, all prompts would give almost the same features.
        "initializer_factor": 4.0,
    }
    return CLIPTextConfig(**settings | changes)


def _vae(**changes) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
        **changes,
    )


def _scheduler(**changes) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **changes,
    )


def stable_diffusion(
    folder: pathlib.Path, *, v_prediction: bool = False, text_width: int = 32
) -> StableDiffusionPipeline:
    """A pipeline like SD 1.4, or like SD 2.1: with v-prediction, linear projections, its own number
    of heads per level, and GELU in CLIP."""
    torch.manual_seed(0)
    variation = {"attention_head_dim": 2, "layers_per_block": 1}
    if v_prediction:
        variation = {
            "attention_head_dim": [1, 4],
            "layers_per_block": 2,
            "use_linear_projection": True,
        }
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=text_width,
            **variation,
        ),
        vae=_vae(scaling_factor=0.18215),
        text_encoder=CLIPTextModel(
            _text_config(
                hidden_act="gelu" if v_prediction else "quick_gelu", hidden_size=text_width
            )
        ),
        tokenizer=tokenizer(folder / "new_tokenizer", "!" if v_prediction else "<|endoftext|>"),
        scheduler=_scheduler(prediction_type="v_prediction" if v_prediction else "epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _perturb(pipeline)


def stable_diffusion_xl(folder: pathlib.Path, text_layers: int = 3) -> StableDiffusionXLPipeline:
    """A pipeline like SDXL: two text encoders, the second of `text_layers`, pooled embeddings, time
    ids, several transformer layers per block."""
    torch.manual_seed(1)
    pipeline = StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=[2, 4],
            transformer_layers_per_block=[1, 2],
            cross_attention_dim=32 + 48,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
        ),
        vae=_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(
            _text_config(hidden_size=48, hidden_act="gelu", num_hidden_layers=text_layers)
        ),
        tokenizer=tokenizer(folder / "new_tokenizer"),
        tokenizer_2=tokenizer(folder / "new_tokenizer_2", "!"),
        scheduler=_scheduler(),
    )
    return _perturb(pipeline)


def _perturb(pipeline):
    """Gives biases and norms random values, because zeros and ones would hide a mix-up."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            for parameter in part.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def torch_latents(pipeline, prompts, noise, num_steps, guidance_scale):
    """z_0, (B, h, w, c), of a pipeline from the noise z_T, in the same layout."""
    latents = pipeline(
        prompts,
        latents=torch.from_numpy(np.array(noise)).permute(0, 3, 1, 2),
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images
    return latents.permute(0, 2, 3, 1).numpy()


def clip(folder):
    """Saves a CLIP of 32 × 32 pixels and 16 dimensions in a folder, and returns the folder."""
    from respodiff_jax.backbone import byte_tokenizer  # needs JAX, unlike the rest

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "projection_dim": 16}
    ids = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = CLIPConfig(
        text_config=tower | ids,
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    CLIPProcessor(image_processor=processor, tokenizer=byte_tokenizer()).save_pretrained(folder)
    return folder
