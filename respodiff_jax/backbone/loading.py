"""Opens a diffusers folder or a hub id as a `Backbone`."""

import functools
import pathlib
from typing import Any

from respodiff_jax.backbone import flax_models, options
from respodiff_jax.backbone.architectures import random_backbone
from respodiff_jax.backbone.attention import choose_attention
from respodiff_jax.backbone.backbone import Backbone
from respodiff_jax.backbone.files import find_pipeline, sha256
from respodiff_jax.backbone.text import read_tokenizer
from respodiff_jax.backbone.weights import load_weights
from respodiff_jax.errors import UserError, shortened


def load_backbone(
    name_or_path: str | pathlib.Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    attention: str = "auto",
    cache_dir: str | pathlib.Path | None = None,
    abstract: bool = False,
) -> Backbone:
    """Loads a Stable Diffusion 1.x, 2.x or XL pipeline; only a single file needs torch.

    Args:
      name_or_path: a diffusers folder, also on gs://; a hub id, which is downloaded to the Hugging
        Face cache or, without a network, read from it; a single-file checkpoint, which PyTorch
        converts once, see `single_file.converted`; "emoji-world", the model that comes with the
        package; or "random/tiny" and other random weights, see `random_backbone`.
      revision: branch, tag or commit of a hub id; "seed-1" and so on for random weights.
      variant: "fp16" reads `*.fp16.safetensors`. None reads the plain files or, if there are none,
        the fp16 files.
      dtype: "float32" or "bfloat16", of all parameters and computation.
      attention: the implementation in UNet and VAE: "plain", "chunked" (long sequences in chunks),
        "flash" (TPU), "cudnn" (NVIDIA, bfloat16), "stock" (diffusers' own), or "auto", the best
        that this backend has.
      cache_dir: replaces the default Hugging Face cache, and the cache of converted single files
        and of copies from gs://.
      abstract: leave the weights for `Backbone.loaded` to read, to check early whether everything
        fits together. `params` are then `ShapeDtypeStruct`s. The weight files are fetched
        nevertheless, because the identity holds their hash.

    Returns:
      The `Backbone`, with its parameters as numpy arrays. Its identity holds the commit of a hub
      model (None for a folder) and the sha256 of the UNet's weight files, concatenated in the order
      of their names.

    Raises:
      UserError: if there is no such model; if files are missing (names all of them) or damaged; if
        the Flax classes do not compute this kind of model; if the weights do not fit the config; or
        if this backend or dtype does not have the `attention`.
    """
    name = str(name_or_path)
    kind = flax_models.compute_dtype(dtype)
    attention = choose_attention(attention, kind)
    if name.startswith("random/") and not pathlib.Path(name).is_dir():
        seed = (revision or "seed-0").removeprefix("seed-")
        if not seed.isdecimal():
            raise UserError(
                f"`revision` is {revision!r}, expected 'seed-0' or another seed for {name}"
            )
        same = {"dtype": dtype, "attention": attention, "abstract": abstract}
        return random_backbone(name.removeprefix("random/"), seed=int(seed), **same)

    files = find_pipeline(name, revision=revision, variant=variant, cache_dir=cache_dir)
    options.check_scheduler(f"{name}: scheduler/scheduler_config.json", files.scheduler_config)
    configs, scheduler_config = options.as_pipeline_reads(files.configs, files.scheduler_config)
    modules = flax_models.build_modules(configs, kind, name)
    params = {part: _abstract_params(name, part, module) for part, module in modules.items()}
    load = None
    if abstract:
        same = {"revision": files.revision, "variant": variant, "cache_dir": cache_dir}
        load = functools.partial(load_backbone, name, dtype=dtype, attention=attention, **same)
    else:
        params = {part: load_weights(files.weights[part], params[part], kind) for part in params}
    encoders = [part for part in modules if part.startswith("text_encoder")]
    return Backbone(
        identity={
            "name": name,
            "revision": files.revision,
            "variant": variant,
            "unet_sha256": sha256(*files.weights["unet"]),
        },
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoders=tuple(modules[part] for part in encoders),
        tokenizers=tuple(read_tokenizer(folder) for folder in files.tokenizers),
        scheduler_config=scheduler_config,
        params=params,
        dtype=kind,
        zeros_for_empty_prompt=bool(
            len(encoders) == 2 and files.index.get("force_zeros_for_empty_prompt", True)
        ),
        attention=attention,
        load=load,
    )


def _abstract_params(name: str, part: str, module: Any) -> Any:
    """Shapes of a part's parameters; a config may describe a part that cannot be computed."""
    try:
        return flax_models.abstract_params(module)
    except UserError:
        raise
    except Exception as error:  # whatever Flax and diffusers raise
        raise UserError(
            f"{name}: the config of {part} describes a model that cannot be computed"
            f" ({shortened(error)}); download or copy it again"
        ) from error
