"""The pictures of an evaluation: planned, and made so that an interruption costs little.

A protocol's pictures lie in `<out>/<protocol>/base/00000.png` and `.../adapted/00000.png`; those of
one number come from the same noise and prompt.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from respodiff_jax import images as images_lib
from respodiff_jax.adapters import Adapter
from respodiff_jax.backbone import Backbone
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.pictures import Picture
from respodiff_jax.evaluation.suites import Prompt
from respodiff_jax.generation.sampling import SamplerOptions, default_batch_size, sample_images
from respodiff_jax.storage import write_whole

PLAN_FILE = "plan.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """A picture to make: its prompt and seed, and what it is counted under (None: nothing)."""

    prompt: str
    seed: int
    subject: str | None = None


def request(prompt: Prompt, again: int, seed: int) -> Request:
    """The picture of a prompt that was drawn `again` times before; `seed` is for a prompt that has
    none of its own."""
    own = seed if prompt.seed is None else (prompt.seed + again) % 2**32
    return Request(prompt.text, own, prompt.subject)


def repeated(prompts: Sequence[Prompt], images_per_prompt: int, seed: int) -> list[Request]:
    """`images_per_prompt` requests for each prompt; seeds count up."""
    return [
        request(prompt, number, seed + row * images_per_prompt + number)
        for row, prompt in enumerate(prompts)
        for number in range(images_per_prompt)
    ]


def generate_pictures(
    backbone: Backbone,
    requests: Sequence[Request],
    folder: pathlib.Path,
    options: SamplerOptions,
    adapter: Adapter | None = None,
    weights: np.ndarray | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Picture]:
    """Makes the pictures that are not there yet, of the base model and of the adapted one.

    Args:
      backbone: the model.
      requests: what to make.
      folder: gets `base/`, with an adapter `adapted/`, and the plan.
      options: how to sample.
      adapter: concepts, or None for the base model alone.
      weights: `(len(requests), N)`, weight of each concept in each picture.
      settings: JSON-able, all else that the pictures depend on; pictures made under others are not
        continued.

    Returns:
      The base pictures, then the adapted ones.

    Raises:
      UserError: if the folder holds pictures of another plan, naming what differs.
    """
    check_folder(folder, requests, weights, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / PLAN_FILE, json.dumps(_plan(requests, weights, settings)))
    sets = {"base": folder / "base"} | ({} if adapter is None else {"adapted": folder / "adapted"})
    for place in sets.values():
        place.mkdir(parents=True, exist_ok=True)
    missing = [
        i
        for i in range(len(requests))
        if not all((place / f"{i:05d}.png").exists() for place in sets.values())
    ]
    if missing:
        # The batch is that of the whole job, so that continuing it compiles nothing new.
        batch_size = options.batch_size or default_batch_size(
            len(requests),
            jax.local_device_count(),
            options.resolution or backbone.default_resolution,
        )
        pairs = sample_images(
            backbone,
            [requests[i].prompt for i in missing],
            [requests[i].seed for i in missing],
            dataclasses.replace(options, batch_size=batch_size),
            adapter,
            None if weights is None else weights[missing],
            base_twins=adapter is not None,
        )
        done = len(requests) - len(missing)
        progress = tqdm(
            pairs, folder.name, len(requests), initial=done, unit="picture", disable=None
        )
        for i, pair in zip(missing, progress, strict=True):
            made = (pair.image,) if adapter is None else (pair.base, pair.image)
            for image, place in zip(made, sets.values(), strict=True):
                # Under another name first: a picture that is there is whole.
                partial = place / f"{i:05d}.part"
                images_lib.save_png(image, partial, dataclasses.asdict(requests[i]))
                os.replace(partial, place / f"{i:05d}.png")
    return [
        Picture(
            path=place / f"{i:05d}.png",
            images=name,
            index=i,
            prompt=request.prompt,
            subject=request.subject,
            seed=request.seed,
            concepts={} if name == "base" else _concepts(adapter, weights[i]),
        )
        for name, place in sets.items()
        for i, request in enumerate(requests)
    ]


def _concepts(adapter: Adapter, weights: np.ndarray) -> dict[str, float]:
    named = zip(adapter.names, weights.tolist(), strict=True)
    return {name: round(weight, 6) for name, weight in named if weight}


def _plan(
    requests: Sequence[Request], weights: np.ndarray | None, settings: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All that pictures depend on, as JSON gives it back."""
    plan = {
        "settings": dict(settings or {}),
        "requests": [dataclasses.asdict(request) for request in requests],
        "weights": None if weights is None else np.round(weights, 6).tolist(),
    }
    return json.loads(json.dumps(plan))


def check_folder(
    folder: pathlib.Path,
    requests: Sequence[Request],
    weights: np.ndarray | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Whether `generate_pictures` may continue a folder; arguments are as there.

    Raises:
      UserError: if it holds pictures of another plan, naming what differs.
    """
    path = folder / PLAN_FILE
    if not (path.exists() and any(folder.glob("*/*.png"))):
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    wanted = _plan(requests, weights, settings)
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if "settings" in differing:
        old, new = found["settings"], wanted["settings"]
        differing = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if differing:
        raise UserError(
            f"{folder} holds pictures of another evaluation, which differs in"
            f" {', '.join(differing)}; choose another --out, or remove that folder"
        )
