"""Writes a folder of pictures: images, their base twins, a grid and a manifest."""

import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from respodiff_jax import images as images_lib
from respodiff_jax.adapters import Adapter, CombinedAdapter
from respodiff_jax.backbone import Backbone
from respodiff_jax.generation.sampling import ImagePair, SamplerOptions, sample_images
from respodiff_jax.method.reading import Decision
from respodiff_jax.storage import check_output

# The grid shows the first images of the first prompts.
_GRID_PROMPTS, _GRID_COLUMNS = 8, 8


def _prepare_output(out: pathlib.Path, folders: Sequence[str]) -> None:
    """Removes only the files of an earlier call."""
    for pattern in ("images/[0-9]*.png", "base/[0-9]*.png", "grid.png", "manifest.jsonl"):
        for file in out.glob(pattern):
            file.unlink()
    for folder in folders:
        (out / folder).mkdir(exist_ok=True)


def write_folder(
    backbone: Backbone,
    prompts: Sequence[str],
    out: str | os.PathLike,
    *,
    images_per_prompt: int = 1,
    seed: int = 0,
    options: SamplerOptions,
    adapter: Adapter | CombinedAdapter | None = None,
    weights: np.ndarray | None = None,
    decisions: np.ndarray | None = None,
    adapter_sources: Sequence[str] = (),
    base_twins: bool = False,
    overwrite: bool = False,
) -> float:
    """Samples images and writes the files that `generate_folder` describes.

    Args:
      backbone: the model.
      prompts: texts.
      out: folder; new or empty unless `overwrite`.
      images_per_prompt: number of images of each prompt.
      seed: seed of the first image.
      options: how to sample.
      adapter: the concepts, or None for the base model.
      weights: from `concept_weights(adapter, len(prompts), images_per_prompt, ...)`.
      decisions: from `read_prompts`, `(len(prompts), N)`, for the manifest; None reads no prompts.
      adapter_sources: origins of the adapter, for the manifest.
      base_twins: also write each image without the adapter, from the same noise.
      overwrite: allow a folder that is not empty.

    Returns:
      Images per second, with base twins and compile time.

    Raises:
      UserError: if the output folder is not empty or cannot be written.
    """
    out = check_output(out, overwrite)
    _prepare_output(out, ("images", "base") if base_twins else ("images",))
    count = len(prompts) * images_per_prompt
    all_prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    seeds = [int(seed) + i for i in range(count)]
    common = {
        "negative_prompt": options.negative_prompt,
        "sampler": options.sampler,
        "num_steps": options.num_steps,
        "guidance_scale": options.guidance_scale,
        "resolution": options.resolution or backbone.default_resolution,
        "model": dict(backbone.identity),
        "dtype": str(np.dtype(backbone.dtype)),
        "adapter": [str(source) for source in adapter_sources],
    }
    shown: list[tuple[int, ImagePair, dict[str, float]]] = []
    pairs = sample_images(backbone, all_prompts, seeds, options, adapter, weights, base_twins)
    start = time.perf_counter()
    with open(out / "manifest.jsonl", "w", encoding="utf-8") as manifest:
        for i, pair in enumerate(tqdm(pairs, "generate", count, unit="image", disable=None)):
            scales = {} if adapter is None else _scales(adapter, weights[i])
            reading = _reading(adapter, decisions, i // images_per_prompt)
            versions = [("images", pair.image, scales, reading)]
            if base_twins:
                versions.append(("base", pair.base, {}, {}))
            for folder, image, concepts, reading in versions:
                record = {
                    "file": f"{folder}/{i:05d}.png",
                    "prompt": all_prompts[i],
                    "seed": seeds[i],
                    "concepts": concepts,
                    "prompt_reading": reading,
                } | common
                images_lib.save_png(image, out / record["file"], record)
                manifest.write(json.dumps(record) + "\n")
            row, column = divmod(i, images_per_prompt)
            if row < _GRID_PROMPTS and column < _GRID_COLUMNS:
                shown.append((i, pair, scales))
    seconds = time.perf_counter() - start
    _grid(shown, prompts, min(images_per_prompt, _GRID_COLUMNS), seeds).save(out / "grid.png")
    return count * (1 + base_twins) / seconds


def _scales(adapter: Adapter | CombinedAdapter, weights: np.ndarray) -> dict[str, float]:
    """Concept name -> weight, for the concepts that steer an image."""
    named = zip(adapter.names, weights.tolist(), strict=True)
    return {name: round(weight, 6) for name, weight in named if weight}


def _reading(
    adapter: Adapter | CombinedAdapter | None, decisions: np.ndarray | None, prompt: int
) -> dict[str, str]:
    """Group -> what the prompt says about it: "open", "named" or "nobody"."""
    if adapter is None or decisions is None:
        return {}
    groups = [concept.group for concept in adapter.concepts]
    return {
        group: Decision(code).name.lower()
        for group, code in zip(groups, decisions[prompt].tolist(), strict=True)
    }


def _grid(shown, prompts, columns, seeds):
    """A grid with one row for each prompt, below the row of its base twins if there are any.

    A caption names the concepts or, without concepts, the seed.
    """
    rows, labels, captions = [], [], []
    for prompt, start in zip(prompts, range(0, len(shown), columns), strict=False):
        entries = shown[start : start + columns]
        adapted_label = prompt
        if entries[0][1].base is not None:
            rows.append([pair.base for _, pair, _ in entries])
            labels.append(f"{prompt}\nbase")
            captions.append([f"seed {seeds[i]}" for i, _, _ in entries])
            adapted_label = "adapted"
        rows.append([pair.image for _, pair, _ in entries])
        labels.append(adapted_label)
        captions.append([_caption(seeds[i], scales) for i, _, scales in entries])
    per_prompt = len(rows) * columns // len(shown)
    return images_lib.grid(rows, labels, captions=captions, rows_per_group=per_prompt)


def _caption(seed: int, scales: Mapping[str, float]) -> str:
    concepts = [name if scale == 1 else f"{scale:g} {name}" for name, scale in scales.items()]
    return " + ".join(concepts) or f"seed {seed}"
