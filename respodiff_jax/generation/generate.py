"""Draws pictures of prompts, as a list of images or as a folder of files with a manifest."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np
from PIL import Image

from respodiff_jax.adapters import (
    Adapter,
    CombinedAdapter,
    as_adapters,
    check_fits,
    combine,
    unconditional,
)
from respodiff_jax.adapters.model import opened
from respodiff_jax.adapters.reading import read_prompts, reads_prompts
from respodiff_jax.backbone import Backbone
from respodiff_jax.backbone.memory import is_small, nbytes, report_memory
from respodiff_jax.errors import UserError, check_least
from respodiff_jax.generation.folder import check_folder, picture_records, write_folder
from respodiff_jax.generation.limits import check_count, check_memory, host_memory
from respodiff_jax.generation.sampling import (
    SamplerOptions,
    check_size,
    default_batch_size,
    sample_images,
    sampling_bytes,
)
from respodiff_jax.generation.selection import concept_weights
from respodiff_jax.method.schedule import Schedule
from respodiff_jax.storage import PathLike, check_output

Adapters = Adapter | CombinedAdapter | Sequence[Adapter]
Model = Backbone | Callable[[], Backbone]

_MAX_SEED = 2**32 - 1


def generate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    adapter: Adapters | None = None,
    concepts: Mapping[str, float | None] | None = None,
    fair: str | None = None,
    ratio: Mapping[str, float] | None = None,
    safe: bool = False,
    steer_always: bool = False,
    images_per_prompt: int = 1,
    seed: int = 0,
    sampler: str = "ddim",
    num_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str = "",
    resolution: int | None = None,
    batch_size: int | None = None,
) -> list[Image.Image]:
    """Draws pictures on all local devices.

    Image i has seed `seed + i`: the same arguments give the same images, whatever the batch size.
    The images of a prompt follow each other.

    Args:
      model: from `load_model`, or a function that opens the model. The model is opened, and an
        abstract model is loaded, after everything else has been checked.
      prompts: one text or several.
      adapter: one adapter, or several to use together; None draws with the base model alone.
      concepts: concept name -> scale, for every image; None is the concept's default scale.
      fair: a concept group; each image gets one of its concepts, in exact proportions.
      ratio: concept name -> share, for the group of `fair`; the sum is 1. None is uniform.
      safe: add every safety concept at its default scale; `concepts` then names none of them.
      steer_always: steer every prompt at every timestep, as the paper does. By default an adapter
        that reads prompts keeps what a prompt names, and leaves pictures without people as they
        are, and each concept steers up to its `max_timestep`.
      images_per_prompt: at least 1.
      seed: of the first image, and of the order of `fair`; the last image's is at most 2^32-1.
      sampler: one of `method.schedule.SAMPLERS`: "ddim", "dpm++", "euler", "ddim-diffusers".
      num_steps: number of sampling steps.
      guidance_scale: scale of classifier-free guidance; 1 or below means no guidance.
      negative_prompt: prompt of the unconditional half.
      resolution: size of the square images in pixels; None is the adapter's, or the model's own.
      batch_size: images at a time over all devices; None chooses by resolution.

    Returns:
      RGB images of `resolution` pixels a side, `images_per_prompt` for each prompt.

    Raises:
      UserError: if the arguments do not fit each other, the adapter, the model or the memory, or an
        image has values that are not finite.
    """
    request = _check(
        model,
        [prompts] if isinstance(prompts, str) else list(prompts),
        adapter,
        images_per_prompt,
        seed,
        SamplerOptions(num_steps, guidance_scale, negative_prompt, resolution, batch_size, sampler),
        {"concepts": concepts, "fair": fair, "ratio": ratio, "safe": safe},
        steer_always,
    )
    count = len(request.prompts) * images_per_prompt
    pixels = count * request.options.resolution**2
    check_memory(f"a list of {count:,} images", 3 * pixels, host_memory())
    model = request.model.loaded()
    _, weights = _steering(model, request)
    images = sample_images(
        model,
        [prompt for prompt in request.prompts for _ in range(images_per_prompt)],
        range(seed, seed + count),
        request.options,
        request.adapter,
        weights,
    )
    return [Image.fromarray(pair.image) for pair in images]


def generate_folder(
    model: Model,
    prompts: str | Sequence[str],
    out: PathLike,
    *,
    adapter: Adapters | None = None,
    concepts: Mapping[str, float | None] | None = None,
    fair: str | None = None,
    ratio: Mapping[str, float] | None = None,
    safe: bool = False,
    steer_always: bool = False,
    images_per_prompt: int = 1,
    seed: int = 0,
    sampler: str = "ddim",
    num_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str = "",
    resolution: int | None = None,
    batch_size: int | None = None,
    base: bool = False,
    overwrite: bool = False,
    adapter_sources: Sequence[str] = (),
) -> float | None:
    """Writes the pictures of `generate` to a folder, with a progress bar.

    The same call again continues an interrupted one: existing images are not drawn again.

    `out` gets `images/00000.png`, ..., `grid.png` with the first images, and `manifest.jsonl` with
    one line for each image file. Each PNG also contains its own line.

    Args:
      model, prompts, ..., batch_size: as in `generate`.
      out: folder; new, empty, or of an interrupted call with the same arguments, unless
        `overwrite`.
      base: also write each image without the adapter, from the same noise, to `base/`.
      overwrite: replace the images of an earlier call, and allow other files in the folder.
      adapter_sources: origins of the adapters, for the manifest.

    Returns:
      Images per second, those of `base` included, with compile time; None if all existed.

    Raises:
      UserError: as in `generate`, or if the folder has other files or cannot be written.
    """
    if base and not adapter:
        raise UserError("`base` compares with an adapter, but `adapter` is not given")
    check_output(out)
    request = _check(
        model,
        [prompts] if isinstance(prompts, str) else list(prompts),
        adapter,
        images_per_prompt,
        seed,
        SamplerOptions(num_steps, guidance_scale, negative_prompt, resolution, batch_size, sampler),
        {"concepts": concepts, "fair": fair, "ratio": ratio, "safe": safe},
        steer_always,
    )
    common = request.prompts, images_per_prompt, seed, request.options, request.adapter
    common += adapter_sources, base
    # Checked before the weights are read.
    check_folder(out, picture_records(request.model, *common), overwrite)
    model = request.model.loaded()
    decisions, weights = _steering(model, request)
    return write_folder(model, out, *common, weights, decisions, overwrite)


@dataclasses.dataclass(frozen=True)
class _Request:
    model: Backbone
    prompts: list[str]
    adapter: Adapter | CombinedAdapter | None
    choose: Callable[..., np.ndarray | None]
    fair: str | None
    options: SamplerOptions


def _steering(model: Backbone, request: _Request) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The decisions on the prompts, None where nothing reads them, and the images' weights."""
    decisions = None
    if request.adapter is not None and reads_prompts(request.adapter):
        decisions = read_prompts(request.adapter, model, request.prompts)
    weights = request.choose(decisions=decisions)
    if request.fair is not None:
        _note_concepts_without_images(request.adapter, request.fair, weights)
    return decisions, weights


def _note_concepts_without_images(
    adapter: Adapter | CombinedAdapter, group: str, weights: np.ndarray
) -> None:
    """Warns if a group is to be fair and one of its concepts steers no image."""
    members = [n for n, concept in enumerate(adapter.concepts) if concept.group == group]
    steers = weights[:, members].any(0)
    without = [adapter.names[n] for n, some in zip(members, steers, strict=True) if not some]
    if without and not steers.any():
        warnings.warn(
            f"no image is steered for {group}: each prompt is read as naming one of its values, or"
            " nobody; `steer_always` steers every prompt",
            stacklevel=3,
        )
    elif without:
        warnings.warn(
            f"no image is steered towards {', '.join(without)}: of {len(weights)} image(s), the"
            f" shares of {group} leave none for it",
            stacklevel=3,
        )


def _check(
    model: Model,
    prompts: list[str],
    adapter: Adapters | None,
    images_per_prompt: int,
    seed: int,
    options: SamplerOptions,
    selection: dict,
    steer_always: bool,
) -> _Request:
    """Checks everything that needs no weights; opens the model last."""
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise UserError(f"`prompts` is {prompts!r}, expected a text or a non-empty list of texts")
    check_least("`images_per_prompt`", images_per_prompt)
    count = len(prompts) * images_per_prompt
    check_count(count)
    last = _MAX_SEED - count + 1
    if not 0 <= seed <= last:
        raise UserError(f"`seed` is {seed}, expected 0 .. {last} for {count} image(s)")
    if model is None:
        raise UserError("no model: give `model`, or `adapter` for the model it was trained on")
    adapters = [unconditional(a) if steer_always else a for a in as_adapters(adapter)]
    combined = combine([part for a in adapters for part in a.parts]) if adapters else None
    choose = partial(
        concept_weights, combined, len(prompts), images_per_prompt, seed=seed, **selection
    )
    choose()  # checks the selection
    model = opened(model)
    if options.resolution is None:
        resolution = combined.backbone["resolution"] if combined else model.default_resolution
        options = dataclasses.replace(options, resolution=resolution)
    for one in adapters:
        check_fits(one, model, options.resolution)
    check_size(options, model)
    Schedule.from_config(model.scheduler_config, options.num_steps, options.sampler)
    model.tokenise([*prompts, options.negative_prompt])
    _check_memory(model, options, count)
    return _Request(model, prompts, combined, choose, selection["fair"], options)


def _check_memory(model: Backbone, options: SamplerOptions, count: int) -> None:
    """Warns if a large model that has not been read yet may not fit into the memory."""
    if model.load is None or is_small(model.params):
        return
    devices = jax.local_device_count()
    batch_size = options.batch_size or default_batch_size(count, devices, options.resolution)
    sampling = sampling_bytes(model, options.resolution, batch_size // devices)
    report_memory(
        {"the model": nbytes(model.params), "sampling": sampling},
        f"lower `batch_size` (now {batch_size}) or `resolution`, or set `dtype` to bfloat16",
    )
