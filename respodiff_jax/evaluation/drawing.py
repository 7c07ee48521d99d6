"""Drawing an evaluation's pictures; an interrupted evaluation draws only what is missing.

The pictures of a part are `<out>/<part>/base/00000.png` and `<out>/<part>/adapted/00000.png`. Base
and adapted pictures of one number share prompt and noise.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from respodiff_jax import images as images_lib
from respodiff_jax.adapters import Adapter
from respodiff_jax.backbone import Backbone
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.pictures import Picture
from respodiff_jax.evaluation.suites import Prompt
from respodiff_jax.generation.folder import scales_of
from respodiff_jax.generation.sampling import Encode, SamplerOptions, sample_images
from respodiff_jax.progress import Progress
from respodiff_jax.storage import read_json, write_whole

REQUESTS_FILE = "plan.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """A picture to draw: its prompt, its seed, and the subject it is counted under, or None."""

    prompt: str
    seed: int
    subject: str | None = None


def requests_per_subject(
    prompts: Sequence[Prompt], images_per_subject: int, seed: int
) -> list[Request]:
    """`images_per_subject` requests for each subject, one subject after the other.

    A subject takes its prompts in turn. Seeds count up from `seed`, unless a prompt has its own. No
    two requests have the same prompt and seed: the later one takes the next seed that is free.
    """
    subjects: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        subjects.setdefault(prompt.subject, []).append(prompt)
    requests: list[Request] = []
    taken: set[tuple[str, int]] = set()
    for own in subjects.values():
        for number in range(images_per_subject):
            repeat, which = divmod(number, len(own))
            requests.append(_request(own[which], repeat, seed + len(requests), taken))
    return requests


def requests_per_prompt(
    prompts: Sequence[Prompt], images_per_prompt: int, seed: int
) -> list[Request]:
    """`images_per_prompt` requests for each prompt, with seeds as in `requests_per_subject`."""
    taken: set[tuple[str, int]] = set()
    return [
        _request(prompt, repeat, seed + row * images_per_prompt + repeat, taken)
        for row, prompt in enumerate(prompts)
        for repeat in range(images_per_prompt)
    ]


def _request(prompt: Prompt, repeat: int, seed: int, taken: set[tuple[str, int]]) -> Request:
    """Picture number `repeat` of a prompt; `seed` is for a prompt that has none.

    Prompts and seeds that are `taken` would give the same picture again; this one's are added.
    """
    own = seed if prompt.seed is None else (prompt.seed + repeat) % 2**32
    while (prompt.text, own) in taken:
        own = (own + 1) % 2**32
    taken.add((prompt.text, own))
    return Request(prompt.text, own, prompt.subject)


def draw_pictures(
    model: Backbone,
    requests: Sequence[Request],
    folder: pathlib.Path,
    options: SamplerOptions,
    adapter: Adapter | None = None,
    weights: np.ndarray | None = None,
    settings: Mapping[str, Any] | None = None,
    steering: np.ndarray | None = None,
    encode: Encode | None = None,
) -> list[Picture]:
    """Draws the pictures that do not exist yet, with the base model and with the adapter.

    Args:
      model: the model.
      requests: M pictures to draw.
      folder: receives the requests and `base/`; with an adapter also `adapted/`.
      options: sampler options.
      adapter: the N concepts, or None for the base model alone.
      weights: `(M, N)`, weight of each concept in each picture, if all prompts were open; None
        without an adapter.
      settings: JSON-able, everything else that the pictures depend on.
      steering: `(M, N)`, the weights after the prompts were read; None is `weights`.
      encode: the conditioning of the requests' prompts; None is the model's own.

    Returns:
      The base pictures, then the adapted pictures.

    Raises:
      UserError: if the folder has pictures of other requests or settings, naming what differs.
    """
    check_folder(folder, requests, weights, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / REQUESTS_FILE, json.dumps(_record(requests, weights, settings)))
    steering = weights if steering is None else steering
    sets = {"base": folder / "base"} | ({} if adapter is None else {"adapted": folder / "adapted"})
    for place in sets.values():
        place.mkdir(parents=True, exist_ok=True)
    missing = [
        i
        for i in range(len(requests))
        if not all((place / f"{i:05d}.png").exists() for place in sets.values())
    ]
    if missing:
        pairs = sample_images(
            model,
            [request.prompt for request in requests],
            [request.seed for request in requests],
            options,
            adapter,
            steering,
            base_twins=adapter is not None,
            only=missing,
            encode=encode,
        )
        done = len(requests) - len(missing)
        progress = Progress(pairs, folder.name, len(requests), initial=done, unit="picture")
        for i, pair in zip(missing, progress, strict=True):
            drawn = (pair.image,) if adapter is None else (pair.base, pair.image)
            for image, place in zip(drawn, sets.values(), strict=True):
                images_lib.save_png(image, place / f"{i:05d}.png", dataclasses.asdict(requests[i]))
    return [
        Picture(
            path=place / f"{i:05d}.png",
            picture_set=name,
            index=i,
            prompt=request.prompt,
            subject=request.subject,
            seed=request.seed,
            concepts={} if name == "base" else scales_of(adapter, steering[i]),
        )
        for name, place in sets.items()
        for i, request in enumerate(requests)
    ]


def check_folder(
    folder: pathlib.Path,
    requests: Sequence[Request],
    weights: np.ndarray | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Checks that `draw_pictures` with these arguments may continue a folder.

    Of mappings within the settings, only the keys given here are compared.

    Raises:
      UserError: if the folder has pictures of other requests or settings, naming what differs.
    """
    path = folder / REQUESTS_FILE
    if not (path.exists() and any(folder.glob("*/*.png"))):
        return
    found = read_json(path, "record of pictures")
    wanted = _record(requests, weights, settings)
    old, new = found.pop("settings", {}), wanted.pop("settings")
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            if key == "sampling":  # a record without a sampler is of ddim
                before, now = ({"sampler": "ddim"} | sampling for sampling in (before, now))
            before = {name: before.get(name) for name in now}
        if before != now:
            differing.append(key)
    if differing:
        raise UserError(
            f"{folder} has pictures of another evaluation, which differs in"
            f" {', '.join(differing)}; choose another `out`, or remove that folder"
        )


def _record(
    requests: Sequence[Request], weights: np.ndarray | None, settings: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Everything that the pictures depend on, as JSON gives it back."""
    record = {
        "settings": dict(settings or {}),
        "requests": [dataclasses.asdict(request) for request in requests],
        "weights": None if weights is None else np.round(weights, 6).tolist(),
    }
    return json.loads(json.dumps(record))
