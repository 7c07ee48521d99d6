"""Converts a single-file checkpoint with diffusers' own loader. This file needs PyTorch."""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import huggingface_hub
import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    infer_diffusers_model_type,
    load_single_file_checkpoint,
)

from respodiff_jax.backbone.weights import SCALES
from respodiff_jax.errors import UserError

_PIPELINES = {
    "v1": diffusers.StableDiffusionPipeline,
    "v2": diffusers.StableDiffusionPipeline,
    "xl_base": diffusers.StableDiffusionXLPipeline,
}
_UNET = "model.diffusion_model."
_PARTS = (_UNET, "first_stage_model.", "vae.", "cond_stage_model.", "conditioner.")
_BYTES = {torch.float8_e4m3fn, torch.float8_e5m2}


def convert(file: pathlib.Path, folder: pathlib.Path, cache_dir: Any) -> None:
    """Writes the diffusers folder of a checkpoint, with what diffusers' own loader reads of it.

    Configs and tokenizers come from the hub's model of this kind, as the loader chooses it, or from
    the Hugging Face cache. Where the file says that it predicts v (`v_pred`, `ztsnr`), so does the
    folder; diffusers does not read these two entries.

    Raises:
      UserError: if the file is damaged, incomplete, quantised or of another kind, or there are no
        configs.
    """
    checkpoint = _read(file)
    kind = infer_diffusers_model_type(checkpoint)
    _check(file, checkpoint, kind)
    configs = _configs(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind], kind, cache_dir)
    no_checker = {"safety_checker": None, "requires_safety_checker": False}
    with _quiet():
        try:
            pipeline = _PIPELINES[kind].from_single_file(
                str(file),
                config=str(configs),
                torch_dtype=_dtype(checkpoint),
                **({} if kind == "xl_base" else no_checker),
                feature_extractor=None,
            )
        except Exception as error:  # the loader raises many kinds
            # It leaves parameters that the file lacks on the device "meta", and fails to copy them.
            reason = " ".join(str(error).split())
            if "meta tensor" in reason:
                reason = "it lacks parameters of the UNet or the VAE; get it again"
            raise UserError(f"model '{file}' cannot be converted: {reason:.200}") from error
        absent = [
            f"{part}: {name}"
            for part, module in pipeline.components.items()
            if isinstance(module, torch.nn.Module)
            for name, tensor in module.state_dict().items()
            if tensor.is_meta
        ]
        if absent:
            raise UserError(
                f"model '{file}' lacks {len(absent)} parameters ({'; '.join(absent[:3])}); expected"
                " a whole model with its text encoders and VAE"
            )
        if "v_pred" in checkpoint:
            zero_snr = {"rescale_betas_zero_snr": True} if "ztsnr" in checkpoint else {}
            pipeline.scheduler.register_to_config(prediction_type="v_prediction", **zero_snr)
        pipeline.save_pretrained(folder, safe_serialization=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' progress bars and remarks on entries that it does not use."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.utils.logging.set_verbosity(level)
        diffusers.utils.logging.enable_progress_bar()


def _read(file: pathlib.Path) -> Mapping[str, Any]:
    try:
        checkpoint = load_single_file_checkpoint(str(file))
    except Exception as error:  # safetensors, pickle and torch raise many kinds
        raise UserError(
            f"model '{file}' is damaged, or holds objects besides tensors, which could run code;"
            " nothing was run. Get it again, or as .safetensors"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"model '{file}' holds a {type(checkpoint).__name__}, expected tensors")
    return checkpoint


def _check(file: pathlib.Path, checkpoint: Mapping[str, Any], kind: str) -> None:
    if kind not in _PIPELINES:
        raise UserError(
            f"model '{file}' is a checkpoint of the kind {kind!r}, expected Stable Diffusion 1.x,"
            " 2.x or XL"
        )
    unet = {name: x for name, x in checkpoint.items() if name.startswith(_UNET)}
    if not unet:
        raise UserError(
            f"model '{file}' has no UNet ({_UNET}*), only for example"
            f" {', '.join(sorted(map(str, checkpoint))[:2])!r:.120}; expected a whole model, not a"
            " LoRA, VAE or other part"
        )
    scales = [name for name in checkpoint if SCALES.search(str(name))]
    if scales or not all(x.is_floating_point() for x in unet.values()):
        raise UserError(
            f"model '{file}' is quantised, which this package does not compute; use the file in"
            " float16, bfloat16 or float32"
        )


def _dtype(checkpoint: Mapping[str, Any]) -> torch.dtype:
    """float16, bfloat16 or float32: the first that holds every weight exactly."""
    kinds = {
        x.dtype
        for name, x in checkpoint.items()
        if name.startswith(_PARTS) and x.is_floating_point()
    }
    for dtype in (torch.float16, torch.bfloat16):
        if kinds <= {dtype} | _BYTES:
            return dtype
    return torch.float32


def _configs(source: Mapping[str, str], kind: str, cache_dir: Any) -> pathlib.Path:
    """The folder with the configs and tokenizers of a kind of model, from the hub or its cache."""
    name = source["pretrained_model_name_or_path"]
    suffixes = ("", "_2") if kind == "xl_base" else ("",)
    parts = ["unet", "vae", *(f"text_encoder{suffix}" for suffix in suffixes)]
    needed = ["model_index.json", "scheduler/scheduler_config.json"]
    needed += [f"{part}/config.json" for part in parts]
    for suffix in suffixes:
        needed += [f"tokenizer{suffix}/{file}" for file in ("vocab.json", "merges.txt")]
    options = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    also = [f"tokenizer{suffix}/{file}" for suffix in suffixes for file in options]
    fetch = (
        f"run once where there is a network, or: hf download {name} --include '*.json' '*/*.txt'"
    )
    try:
        folder = huggingface_hub.snapshot_download(
            name, cache_dir=cache_dir, allow_patterns=[*needed, *also]
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"a checkpoint of this kind needs the configs and tokenizer of {name}, which are not in"
            f" the Hugging Face cache and cannot be fetched; {fetch}"
        ) from error
    missing = [file for file in needed if not pathlib.Path(folder, file).is_file()]
    if missing:
        raise UserError(
            f"a checkpoint of this kind needs {', '.join(missing)} of {name}, which the Hugging"
            f" Face cache lacks; {fetch}"
        )
    return pathlib.Path(folder)
