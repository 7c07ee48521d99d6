"""A diffusers folder or hub id -> `Backbone`."""

import dataclasses
import functools
import pathlib

from transformers import CLIPTokenizer

from respodiff_jax.backbone import flax_models
from respodiff_jax.backbone.architectures import random_backbone
from respodiff_jax.backbone.attention import choose_attention
from respodiff_jax.backbone.backbone import Backbone
from respodiff_jax.backbone.files import find_pipeline, sha256
from respodiff_jax.backbone.weights import load_weights
from respodiff_jax.errors import UserError


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
    """Loads a Stable Diffusion 1.x, 2.x or XL pipeline, without torch.

    Args:
      name_or_path: a diffusers folder, which may be on gs://; or a hub id, fetched into the Hugging
        Face cache or, without a network, taken from it; or "emoji-world", which the package brings;
        or "random/tiny" and the like, see `random_backbone`.
      revision: branch, tag or commit of a hub id; "seed-1" and the like for a random one.
      variant: "fp16" reads `*.fp16.safetensors`. None reads the plain files or, where there are
        none, fp16.
      dtype: "float32" or "bfloat16", of all parameters and computation.
      attention: of UNet and VAE: "plain", "flash" (TPU), "cudnn" (NVIDIA, bfloat16), "auto", or
        "stock", diffusers' own.
      cache_dir: instead of the default Hugging Face cache, or the cache of copies from gs://.
      abstract: `params` are `ShapeDtypeStruct`s, and `Backbone.loaded` reads the weights later. For
        checking whether everything fits together before that. The weight files are fetched all the
        same, since the identity has their digest.

    Returns:
      The `Backbone`, with its parameters as numpy arrays. Its identity records the snapshot's
      commit (None for a folder) and the sha256 of the UNet's weight files, concatenated in the
      order of their names.

    Raises:
      UserError: if the model is not there, is incomplete (naming every missing file), is of a kind
        that the Flax models do not compute, or its weights are damaged or do not fit the config;
        or if this backend or dtype does not have that attention.
    """
    if abstract:
        model = _open(name_or_path, revision, variant, dtype, attention, cache_dir, abstract=True)
        load = functools.partial(
            load_backbone,
            name_or_path,
            revision=model.identity["revision"],
            variant=variant,
            dtype=dtype,
            attention=attention,
            cache_dir=cache_dir,
        )
        return dataclasses.replace(model, load=load)
    return _open(name_or_path, revision, variant, dtype, attention, cache_dir, abstract=False)


def _open(
    name_or_path: str | pathlib.Path,
    revision: str | None,
    variant: str | None,
    dtype: str,
    attention: str,
    cache_dir: str | pathlib.Path | None,
    abstract: bool,
) -> Backbone:
    name = str(name_or_path)
    kind = flax_models.compute_dtype(dtype)
    attention = choose_attention(attention, kind)
    if name.startswith("random/") and not pathlib.Path(name).is_dir():
        seed = (revision or "seed-0").removeprefix("seed-")
        if not seed.isdecimal():
            raise UserError(f"revision={revision!r}: for {name} expected 'seed-0' or another seed.")
        architecture = name.removeprefix("random/")
        return random_backbone(
            architecture, dtype=dtype, attention=attention, seed=int(seed), abstract=abstract
        )

    files = find_pipeline(name, revision=revision, variant=variant, cache_dir=cache_dir)
    towers = [part for part in files.configs if part.startswith("text_encoder")]
    modules = flax_models.build_modules(files.configs, kind, name)
    params = {part: flax_models.abstract_params(module) for part, module in modules.items()}
    if not abstract:
        params = {part: load_weights(files.weights[part], params[part], kind) for part in params}
    return Backbone(
        identity={
            "name": name,
            "revision": files.revision,
            "variant": variant,
            "unet_sha256": sha256(*files.weights["unet"]),
        },
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoders=tuple(modules[t] for t in towers),
        tokenizers=tuple(CLIPTokenizer.from_pretrained(folder) for folder in files.tokenizers),
        scheduler_config=files.scheduler_config,
        params=params,
        dtype=kind,
        zeros_for_empty_prompt=bool(
            len(towers) == 2 and files.index.get("force_zeros_for_empty_prompt", True)
        ),
        attention=attention,
    )
