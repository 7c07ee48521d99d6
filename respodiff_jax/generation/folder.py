"""Writes a folder of pictures: images, their base twins, a grid and a manifest; resumable."""

import json
import pathlib
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from respodiff_jax import images as images_lib
from respodiff_jax.adapters import Adapter, CombinedAdapter, adapter_sha256
from respodiff_jax.backbone import Backbone
from respodiff_jax.errors import UserError
from respodiff_jax.generation.sampling import SamplerOptions, sample_images
from respodiff_jax.method.reading import Decision
from respodiff_jax.progress import Progress
from respodiff_jax.storage import PathLike, check_output, read_json_lines, write_whole

MANIFEST = "manifest.jsonl"
# What a record has only after the model has read the prompts.
_READ = ("concepts", "prompt_reading")
# The grid shows the first images of the first prompts.
_GRID_PROMPTS, _GRID_COLUMNS = 8, 8


def picture_records(
    backbone: Backbone,
    prompts: Sequence[str],
    images_per_prompt: int,
    seed: int,
    options: SamplerOptions,
    adapter: Adapter | CombinedAdapter | None,
    adapter_sources: Sequence[str],
    base_twins: bool,
    weights: np.ndarray | None = None,
    decisions: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """The lines of the manifest: for each image its file and everything that it depends on.

    A base twin follows its image. Arguments are as in `write_folder`.
    """
    common = common_record(backbone, options, adapter_sources, adapter)
    records = []
    for i, prompt in enumerate(p for p in prompts for _ in range(images_per_prompt)):
        scales = {} if weights is None else scales_of(adapter, weights[i])
        versions = [("images", scales, reading_of(adapter, decisions, i // images_per_prompt))]
        versions += [("base", {}, {})] if base_twins else []
        records += [
            {
                "file": f"{folder}/{i:05d}.png",
                "prompt": prompt,
                "seed": int(seed) + i,
                "concepts": concepts,
                "prompt_reading": reading,
            }
            | common
            for folder, concepts, reading in versions
        ]
    return records


def check_folder(
    out: PathLike,
    records: Sequence[Mapping[str, Any]],
    overwrite: bool = False,
    unknown: Collection[str] = _READ,
) -> pathlib.Path:
    """Checks that a folder can be written, and is empty or holds the same pictures.

    Makes nothing. `records` are the wanted lines of its manifest; the fields `unknown` are not
    compared.

    Raises:
      UserError: if the folder cannot be written or, unless `overwrite`, has other files.
    """
    out = check_output(out)
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if overwrite or names <= {f"{MANIFEST}.partial"}:
        return out
    advice = "choose another, or set `overwrite` to replace its images"
    if not (out / MANIFEST).exists():
        raise UserError(f"output folder {out} is not empty, and has no {MANIFEST}; {advice}")
    found = read_json_lines(out / MANIFEST, "manifest")
    wanted = json.loads(json.dumps(records))
    differing = set()
    for old, new in zip(found, wanted, strict=False):
        old = old if isinstance(old, dict) else {}
        differing |= {key for key in {*old, *new} - {*unknown} if old.get(key) != new.get(key)}
    if len(found) != len(wanted):
        differing = {"number of images"}
    if differing:
        raise UserError(
            f"output folder {out} has images of another command, which differs in"
            f" {', '.join(sorted(differing))}; {advice}"
        )
    return out


def write_folder(
    backbone: Backbone,
    out: PathLike,
    prompts: Sequence[str],
    images_per_prompt: int,
    seed: int,
    options: SamplerOptions,
    adapter: Adapter | CombinedAdapter | None,
    adapter_sources: Sequence[str],
    base_twins: bool,
    weights: np.ndarray | None,
    decisions: np.ndarray | None,
    overwrite: bool,
) -> float | None:
    """Samples images and writes the files that `generate_folder` describes.

    Args:
      backbone: the model.
      out: folder; new, empty, or of an interrupted call with the same arguments, unless
        `overwrite`.
      prompts: texts.
      images_per_prompt: number of images of each prompt.
      seed: seed of the first image.
      options: how to sample.
      adapter: the concepts, or None for the base model.
      adapter_sources: origins of the adapter, for the manifest.
      base_twins: also write each image without the adapter, from the same noise.
      weights: from `concept_weights(adapter, len(prompts), images_per_prompt, ...)`.
      decisions: from `read_prompts`, `(len(prompts), N)`, for the manifest; None reads no prompts.
      overwrite: replace the images of a folder that is not empty.

    Returns:
      Images per second, with base twins and compile time; None if all were there already.

    Raises:
      UserError: if the output folder has other files or cannot be written.
    """
    common = prompts, images_per_prompt, seed, options, adapter, adapter_sources, base_twins
    records = picture_records(backbone, *common, weights, decisions)
    out = check_folder(out, records, overwrite, unknown=())
    if overwrite:
        _remove_images(out)
    # The manifest comes first: it says what an interrupted call was going to draw.
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / MANIFEST, "".join(json.dumps(record) + "\n" for record in records))
    for folder in ("images", "base") if base_twins else ("images",):
        (out / folder).mkdir(exist_ok=True)
    versions = 1 + base_twins
    pairs = [records[i : i + versions] for i in range(0, len(records), versions)]
    missing = [
        i for i, pair in enumerate(pairs) if not all((out / r["file"]).exists() for r in pair)
    ]
    start = time.perf_counter()
    if missing:
        drawn = sample_images(
            backbone,
            [pair[0]["prompt"] for pair in pairs],
            [pair[0]["seed"] for pair in pairs],
            options,
            adapter,
            weights,
            base_twins,
            only=missing,
        )
        done = len(pairs) - len(missing)
        progress = Progress(drawn, "generate", len(pairs), initial=done, unit="image")
        for i, images in zip(missing, progress, strict=True):
            for image, record in zip(images, pairs[i], strict=False):
                images_lib.save_png(image, out / record["file"], record)
    seconds = time.perf_counter() - start
    grid = _grid(out, pairs, prompts, images_per_prompt)
    write_whole(out / "grid.png", images_lib.to_png(grid))
    return len(missing) * versions / seconds if missing else None


def _remove_images(out: pathlib.Path) -> None:
    """Removes only the files of an earlier call."""
    for pattern in ("images/[0-9]*.png*", "base/[0-9]*.png*", "grid.png", MANIFEST):
        for file in out.glob(pattern):
            file.unlink()


def common_record(
    backbone: Backbone,
    options: SamplerOptions,
    adapter_sources: Sequence[str],
    adapter: Adapter | CombinedAdapter | None,
) -> dict[str, Any]:
    """What the records of all pictures of a call have in common, JSON-able."""
    return {
        "negative_prompt": options.negative_prompt,
        "sampler": options.sampler,
        "num_steps": options.num_steps,
        "guidance_scale": options.guidance_scale,
        "resolution": options.resolution or backbone.default_resolution,
        "model": dict(backbone.identity),
        "dtype": str(np.dtype(backbone.dtype)),
        "adapter": [str(source) for source in adapter_sources],
        "adapter_sha256": None if adapter is None else adapter_sha256(adapter),
    }


def scales_of(adapter: Adapter | CombinedAdapter, weights: np.ndarray) -> dict[str, float]:
    """Concept name -> scale, for the concepts that steer an image of weights `(N,)`."""
    named = zip(adapter.names, weights.tolist(), strict=True)
    return {name: round(weight, 6) for name, weight in named if weight}


def reading_of(
    adapter: Adapter | CombinedAdapter | None, decisions: np.ndarray | None, row: int
) -> dict[str, str]:
    """Group -> what prompt `row` of decisions `(P, N)` says about it: "open", "named", "nobody"."""
    if adapter is None or decisions is None:
        return {}
    groups = [concept.group for concept in adapter.concepts]
    return {
        group: Decision(code).name.lower()
        for group, code in zip(groups, decisions[row].tolist(), strict=True)
    }


def _grid(
    out: pathlib.Path,
    pairs: Sequence[Sequence[Mapping[str, Any]]],
    prompts: Sequence[str],
    images_per_prompt: int,
) -> Image.Image:
    """A grid with one row for each prompt, below the row of its base twins if there are any.

    A caption names the concepts or, without concepts, the seed.
    """
    rows, labels, captions = [], [], []
    columns = min(images_per_prompt, _GRID_COLUMNS)
    for number, prompt in enumerate(prompts[:_GRID_PROMPTS]):
        first = number * images_per_prompt
        versions = list(zip(*pairs[first : first + columns], strict=True))
        for records in reversed(versions):  # the base twins first
            rows.append([np.asarray(Image.open(out / record["file"])) for record in records])
            captions.append([_caption(record["seed"], record["concepts"]) for record in records])
        labels += [prompt] if len(versions) == 1 else [f"{prompt}\nbase", "adapted"]
    return images_lib.grid(rows, labels, captions=captions, rows_per_group=len(pairs[0]))


def _caption(seed: int, scales: Mapping[str, float]) -> str:
    concepts = [name if scale == 1 else f"{scale:g} {name}" for name, scale in scales.items()]
    return " + ".join(concepts) or f"seed {seed}"
