"""Which families of models work: docs/models.md, whose table this file checks and writes.

UPDATE_DOCS=1 pytest tests/backbone/test_families.py
"""

import json
import os
import pathlib
import shutil

import pytest
from diffusers import DDIMScheduler, DiffusionPipeline
from test_options import difference_from, edit

from respodiff_jax.backbone import load_backbone
from respodiff_jax.errors import UserError

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "models.md"
SCHEDULER, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"
INDEX, TEXT = "model_index.json", "text_encoder/config.json"
NO_KEY = object()  # removes an entry

# family -> base folder, changes by file, and for a refused family the reason that is printed
FAMILIES = {
    "Stable Diffusion 1.x, and models fine-tuned from it; the safety checker is not run": (
        "sd_folder",
        {
            INDEX: {
                "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
                "feature_extractor": ["transformers", "CLIPImageProcessor"],
                "requires_safety_checker": True,
            },
            SCHEDULER: {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
        },
        None,
    ),
    "Stable Diffusion 2.x, v-prediction": ("sd_v_folder", {}, None),
    "SDXL, and models fine-tuned from it": ("sdxl_folder", {}, None),
    "SD-Turbo, SDXL-Turbo, SDXL-Lightning, Hyper-SD (`trailing`)": (
        "sdxl_folder",
        {
            SCHEDULER: {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_spacing": "trailing",
                "interpolation_type": "linear",
            }
        },
        None,
    ),
    "SDXL with v-prediction and zero terminal SNR (NoobAI)": (
        "sdxl_folder",
        {
            SCHEDULER: {
                "_class_name": "EulerDiscreteScheduler",
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
            }
        },
        None,
    ),
    "v-prediction with zero terminal SNR": (
        "sd_v_folder",
        {SCHEDULER: {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}},
        None,
    ),
    "Waifu Diffusion 1.3, Nitro: saved before diffusers 0.9": (
        "sd_folder",
        {UNET: {"_diffusers_version": "0.4.0", "sample_size": 32}, SCHEDULER: {"steps_offset": 0}},
        None,
    ),
    "Inpainting": ("sd_folder", {UNET: {"in_channels": 9}}, "in_channels is 9"),
    "InstructPix2Pix": ("sd_folder", {UNET: {"in_channels": 8}}, "in_channels is 8"),
    "Depth": ("sd_folder", {UNET: {"in_channels": 5}}, "in_channels is 5"),
    "The ×4 upscaler": (
        "sd_folder",
        {UNET: {"in_channels": 7, "num_class_embeds": 1000}},
        "num_class_embeds is 1000",
    ),
    "Stable unCLIP": (
        "sd_v_folder",
        {UNET: {"class_embed_type": "projection"}},
        "class_embed_type is 'projection'",
    ),
    "SDXL refiner": (
        "sdxl_folder",
        {UNET: {"projection_class_embeddings_input_dim": 64}},
        "the SDXL refiner is not supported",
    ),
    "LCM": ("sd_folder", {UNET: {"time_cond_proj_dim": 256}}, "time_cond_proj_dim is 256"),
    "models with LCM's scheduler": (
        "sdxl_folder",
        {SCHEDULER: {"_class_name": "LCMScheduler", "original_inference_steps": 50}},
        "_class_name is 'LCMScheduler'",
    ),
    "CosXL, Playground 2.5 (EDM)": (
        "sdxl_folder",
        {SCHEDULER: {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}},
        "_class_name is 'EDMEulerScheduler'",
    ),
    "AltDiffusion": (
        "sd_folder",
        {INDEX: {"text_encoder": ["alt_diffusion", "RobertaSeriesModelWithTransformation"]}},
        "text_encoder is 'RobertaSeriesModelWithTransformation'",
    ),
    "DeepFloyd IF": (
        "sd_folder",
        {INDEX: {"_class_name": "IFPipeline", "text_encoder": ["transformers", "T5EncoderModel"]}},
        "text_encoder is 'T5EncoderModel'",
    ),
    "Stable Diffusion 3, Flux, PixArt, Sana": (
        "sd_folder",
        {INDEX: {"_class_name": "FluxPipeline", "unet": NO_KEY}},
        "without a unet",
    ),
    "Kandinsky 2": (
        "sd_folder",
        {UNET: {"encoder_hid_dim_type": "image_proj"}},
        "encoder_hid_dim_type",
    ),
    "Kolors": (
        "sdxl_folder",
        {INDEX: {"_class_name": "KolorsPipeline", "text_encoder": ["kolors", "ChatGLMModel"]}},
        "text_encoder is 'ChatGLMModel'",
    ),
    "Models without a mid-block (BK-SDM, Segmind small and tiny SD)": (
        "sd_folder",
        {UNET: {"mid_block_type": None}},
        "mid_block_type is None",
    ),
    "Models whose layers differ within a block (SSD-1B)": (
        "sdxl_folder",
        {UNET: {"reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]}},
        "reverse_transformer_layers_per_block is",
    ),
    "text encoders with `use_attention_mask`": (
        "sd_folder",
        {TEXT: {"use_attention_mask": True}},
        "use_attention_mask is True",
    ),
    "VAEs without quantisation convolutions": (
        "sd_folder",
        {VAE: {"use_quant_conv": False}},
        "use_quant_conv is False",
    ),
}


def table():
    lines = ["| family | | reason |", "|---|---|---|"]
    for family, (_, _, reason) in FAMILIES.items():
        kept = "agrees" if reason is None else "refused"
        lines.append(f"| {family} | {kept} | {'' if reason is None else f'`{reason}`'} |")
    return "\n".join(lines)


def made(request, tmp_path, family):
    base, changes, _ = FAMILIES[family]
    folder = shutil.copytree(request.getfixturevalue(base), tmp_path / "model")
    for file, entries in changes.items():
        removed = [key for key, value in entries.items() if value is NO_KEY]
        edit(folder / file, *removed, **{k: v for k, v in entries.items() if v is not NO_KEY})
    return folder


@pytest.mark.filterwarnings("ignore:The configuration file of:FutureWarning")
@pytest.mark.parametrize("family", [f for f, (*_, reason) in FAMILIES.items() if reason is None])
def test_family_agrees_with_diffusers(request, tmp_path, family):
    folder = made(request, tmp_path, family)
    has_checker = json.loads((folder / INDEX).read_text()).get("safety_checker")
    without = {"safety_checker": None, "feature_extractor": None} if has_checker else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **without)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    # 1000 is a multiple of 4; for other numbers see the page on `trailing`.
    assert difference_from(pipe, load_backbone(folder), num_steps=4) < 1e-4


@pytest.mark.parametrize("family", [f for f, (*_, reason) in FAMILIES.items() if reason])
def test_family_is_refused_with_the_reason(request, tmp_path, family):
    with pytest.raises(UserError) as error:
        load_backbone(made(request, tmp_path, family), abstract=True)
    assert FAMILIES[family][2] in str(error.value)


def test_page_has_the_table():
    before, _, rest = PAGE.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("\n<!-- end -->")
    assert end
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(f"{before}<!-- table -->\n{table()}{end}{after}")
    assert table() in PAGE.read_text()
