"""The options in a pipeline's config files, and what this package does with each.

An option is obeyed, has one accepted meaning, or cannot change a picture. Every other option is
refused by name: the Flax modules would ignore it and silently compute something else. So are
options that a future release adds.
"""

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_flax_utils import ACT2FN

from respodiff_jax.errors import UserError, check_choice

_BASE_MODELS = "use a Stable Diffusion 1.x, 2.x or XL base model"

# Options with the values that mean what this package computes.
_OFF, _NONE = (False,), (None,)
_UNET_FIXED = {
    **dict.fromkeys(("center_input_sample", "class_embeddings_concat"), _OFF),
    **dict.fromkeys(("dual_cross_attention", "only_cross_attention", "resnet_skip_time_act"), _OFF),
    **dict.fromkeys(("class_embed_type", "cross_attention_norm", "encoder_hid_dim"), _NONE),
    **dict.fromkeys(("encoder_hid_dim_type", "num_attention_heads", "num_class_embeds"), _NONE),
    **dict.fromkeys(("reverse_transformer_layers_per_block", "time_cond_proj_dim"), _NONE),
    **dict.fromkeys(("time_embedding_act_fn", "time_embedding_dim", "timestep_post_act"), _NONE),
    **dict.fromkeys(("downsample_padding", "mid_block_scale_factor"), (1,)),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (3,)),
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default", None),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "norm_num_groups": (32,),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional", None),
}
_VAE_FIXED = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_TEXT_FIXED = {
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "model_type": ("clip_text_model",),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "use_attention_mask": (False, None),
}
_SCHEDULER_FIXED = {
    "prediction_type": ("epsilon", "v_prediction"),
    "shift_terminal": (None,),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "use_dynamic_shifting": (False,),
    "use_flow_sigmas": (False,),
}

# Options that set a precision, or say how the model was trained.
_UNET_HARMLESS = {"split_head_dim", "upcast_attention", "use_memory_efficient_attention"}
_VAE_HARMLESS = {"force_upcast"}
_TEXT_HARMLESS = {
    *("attention_dropout", "dropout", "gradient_checkpointing", "initializer_factor"),
    *("initializer_range", "torch_dtype", *PretrainedConfig().to_dict()),
} - _TEXT_FIXED.keys()
# Options of other samplers than DDIM, which `DDIMScheduler.from_config` ignores, and those that
# matter for pixels alone.
_SCHEDULER_HARMLESS = {
    *("algorithm_type", "clip_sample", "clip_sample_range", "disable_corrector"),
    *("dynamic_thresholding_ratio", "euler_at_final", "final_sigmas_type", "flow_shift"),
    *("interpolation_type", "lambda_min_clipped", "lower_order_final", "noise_sampler_seed"),
    *("predict_epsilon", "predict_x0", "sample_max_value", "sigma_max", "sigma_min"),
    *("skip_prk_steps", "solver_order", "solver_p", "solver_type", "time_shift_type"),
    *("use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas"),
    "variance_type",
}

TEXT_OBEYED = {
    *("eos_token_id", "hidden_act", "hidden_size", "intermediate_size"),
    *("layer_norm_eps", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("projection_dim", "vocab_size"),
}
_SCHEDULER_OBEYED = {
    *("beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "rescale_betas_zero_snr"),
    *("set_alpha_to_one", "steps_offset", "timestep_spacing", "trained_betas"),
}
_UNET_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_VAE_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
}
# Schedulers of models that were trained on the noise levels of DDPM.
_SCHEDULERS = (
    *("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler"),
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
)
_UNET_SIZES = ("in_channels", "out_channels", "cross_attention_dim", "sample_size")
_MAX_LAYERS = 100  # in a row; the text encoder of SDXL has 32


def check_unet(file: str, config: Mapping[str, Any], obeyed: Collection[str]) -> None:
    """Checks unet/config.json; `obeyed` has the names of the Flax module's fields.

    Raises:
      UserError: naming the file and the option that this package would not compute.
    """
    _check(file, config, _UNET_FIXED, _UNET_HARMLESS | set(obeyed), _UNET_BLOCKS)
    for option in ("layers_per_block", "cross_attention_dim", "sample_size"):
        if not isinstance(config.get(option), int):
            raise UserError(f"{file}: {option} is {config.get(option)!r:.80}, expected one integer")
    _check_sizes(file, config, *_UNET_SIZES)
    _check_layers(file, config, "layers_per_block", "transformer_layers_per_block")
    widths = config.get("block_out_channels")
    if (
        not isinstance(widths, list | tuple)
        or not widths
        or any(not isinstance(width, int) or width % 32 for width in widths)
    ):
        raise UserError(
            f"{file}: block_out_channels is {widths!r:.80}, expected a list of multiples of 32, the"
            " number of normalisation groups"
        )


def check_vae(file: str, config: Mapping[str, Any], obeyed: Collection[str]) -> None:
    """Checks vae/config.json, as `check_unet`."""
    _check(file, config, _VAE_FIXED, _VAE_HARMLESS | set(obeyed), _VAE_BLOCKS)
    _check_layers(file, config, "layers_per_block")
    _check_sizes(file, config, "latent_channels", "in_channels", "out_channels", "sample_size")


def check_text_encoder(file: str, config: Mapping[str, Any]) -> None:
    """Checks text_encoder/config.json, as `check_unet`."""
    _check(file, config, _TEXT_FIXED, _TEXT_HARMLESS | TEXT_OBEYED)
    _check_sizes(file, config, *TEXT_OBEYED - {"hidden_act", "layer_norm_eps"})
    _check_layers(file, config, "num_hidden_layers")
    check_choice(f"{file}: hidden_act", config.get("hidden_act", "quick_gelu"), sorted(ACT2FN))


def check_scheduler(file: str, config: Mapping[str, Any]) -> None:
    """Checks scheduler/scheduler_config.json, as `check_unet`."""
    name = config.get("_class_name")
    if name not in _SCHEDULERS:
        raise UserError(
            f"{file}: _class_name is {name!r:.80}, which may not have DDPM's noise levels; expected"
            " the scheduler of a model trained on these, such as DDIMScheduler, PNDMScheduler or"
            " EulerDiscreteScheduler"
        )
    _check(file, config, _SCHEDULER_FIXED, _SCHEDULER_HARMLESS | _SCHEDULER_OBEYED)
    needed = ["beta_schedule", "beta_start", "beta_end"]
    if config.get("trained_betas") is not None:
        needed = []
    elif config.get("beta_schedule") == "squaredcos_cap_v2":
        needed = ["beta_schedule"]
    if missing := [option for option in needed if option not in config]:
        raise UserError(
            f"{file}: {', '.join(missing)} missing; the noise levels that the model was trained on"
            " are needed"
        )


def _check(
    file: str,
    config: Mapping[str, Any],
    fixed: Mapping[str, tuple],
    known: Collection[str],
    blocks: Mapping[str, tuple] | None = None,
) -> None:
    for option, value in config.items():
        if option in fixed and value not in fixed[option]:
            raise UserError(
                f"{file}: {option} is {value!r:.80}, this package computes only"
                f" {' or '.join(map(repr, fixed[option]))}; {_BASE_MODELS}"
            )
        if option not in known and option not in fixed and not option.startswith("_"):
            raise UserError(
                f"{file}: {option:.60} is {value!r:.80}, an option that this package does not know"
                " and that could change the pictures; remove it if it does not, or"
                f" {_BASE_MODELS}"
            )
    for option, accepted in (blocks or {}).items():
        kinds = config.get(option, ())
        if not isinstance(kinds, list | tuple) or any(kind not in accepted for kind in kinds):
            raise UserError(
                f"{file}: {option} is {kinds!r:.80}, expected a list of only"
                f" {' or '.join(map(repr, accepted))}"
            )


def _check_sizes(file: str, config: Mapping[str, Any], *names: str) -> None:
    for option in names:
        value = config.get(option, 0)
        if not isinstance(value, int) or abs(value) >= 2**31:
            raise UserError(f"{file}: {option} is {value!r:.80}, expected an integer of 32 bits")


def _check_layers(file: str, config: Mapping[str, Any], *names: str) -> None:
    """Checks numbers of layers; each layer takes time and memory, even without weights."""
    for option in names:
        value = config.get(option, 1)
        counts = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(count, int) and 0 < count <= _MAX_LAYERS for count in counts):
            raise UserError(
                f"{file}: {option} is {value!r:.80}, expected integers from 1 to {_MAX_LAYERS}"
            )


def as_pipeline_reads(
    configs: Mapping[str, Mapping[str, Any]], scheduler_config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of the parts and of the scheduler, with what diffusers' pipelines correct.

    The pipelines of SD 1.x and 2.x, which have one text encoder, set `steps_offset` to 1. For a
    UNet saved before diffusers 0.9 they replace a `sample_size` below 64, then a default, by 64.
    """
    configs, scheduler_config = copy.deepcopy((dict(configs), dict(scheduler_config)))
    if "text_encoder_2" in configs:
        return configs, scheduler_config
    unet = configs["unet"]
    version = re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version")))
    is_old = version is not None and tuple(map(int, version.groups())) < (0, 9)
    if is_old and isinstance(unet.get("sample_size"), int) and unet["sample_size"] < 64:
        unet["sample_size"] = 64
    return configs, scheduler_config | {"steps_offset": 1}
