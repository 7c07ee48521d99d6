"""The pictures of an evaluation: planned, generated so that an interruption costs little, or given.

A protocol's pictures lie in `<out>/<protocol>/base/00000.png` and `.../adapted/00000.png`; those of
one number come from the same noise and prompt.
"""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from respodiff_jax import images as images_lib
from respodiff_jax.adapters import Adapter
from respodiff_jax.backbone import Backbone
from respodiff_jax.data.prompt_files import SEED, Column, read_table
from respodiff_jax.evaluation.results import write_whole
from respodiff_jax.evaluation.suites import Prompt
from respodiff_jax.sampling import SamplerOptions, default_batch_size, sample_images

PLAN_FILE = "plan.json"
_METADATA = {
    "file": Column(),
    "prompt": Column(may_be_blank=True),
    "subject": Column(required=False),
    "seed": SEED,
}
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# What Pillow raises for files that are no pictures, are damaged, or too large to be opened safely.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclasses.dataclass(frozen=True)
class Request:
    """A picture to make: its prompt and seed, and what it is counted under (None: nothing)."""

    prompt: str
    seed: int
    subject: str | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that is there.

    Attributes:
      path: of its file.
      images: "base", "adapted" or "given".
      index: within its set; base and adapted of one index share their noise.
      prompt: what was asked for, or None if unknown.
      subject: what it is counted under, or None.
      seed: or None.
      concepts: what steered it, concept -> weight.
    """

    path: pathlib.Path
    images: str
    index: int
    prompt: str | None
    subject: str | None
    seed: int | None = None
    concepts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def row(self, out: pathlib.Path, protocol: str) -> dict[str, Any]:
        """Its line in `per_image.csv`, without scores."""
        return {
            "file": os.path.relpath(self.path.resolve(), out.resolve()),
            "protocol": protocol,
            "images": self.images,
            "index": self.index,
            "prompt": self.prompt,
            "subject": self.subject,
            "seed": self.seed,
            "concepts": "; ".join(f"{name}={weight:g}" for name, weight in self.concepts.items()),
        }


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
      ValueError: if the folder holds pictures of another plan, naming what differs.
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
      ValueError: if it holds pictures of another plan, naming what differs.
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
        raise ValueError(
            f"{folder} holds pictures of another evaluation, which differs in"
            f" {', '.join(differing)}; choose another --out, or remove that folder"
        )


def given_pictures(folder: str | os.PathLike) -> list[Picture]:
    """The pictures of a folder, made by any tool.

    Prompts and subjects come from `metadata.csv`, with `file`, `prompt` and optionally `subject`,
    `seed`; without one from `manifest.jsonl`, as `respodiff generate` writes it, which knows no
    subjects; without either, the subject of a picture is the name of its subfolder.

    Raises:
      ValueError: if there are no pictures, a listed one is missing, or columns are.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of pictures")
    if (folder / "metadata.csv").is_file():
        rows = read_table(folder / "metadata.csv", _METADATA)
    elif (folder / "manifest.jsonl").is_file():
        rows = _read_manifest(folder / "manifest.jsonl")
    else:
        found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES)
        rows = [
            {
                "file": file.relative_to(folder),
                "subject": None if file.parent == folder else file.parent.name,
            }
            for file in found
        ]
    if not rows:
        raise ValueError(f"{folder} has no pictures; expected {', '.join(_SUFFIXES)}")
    if lost := [str(row["file"]) for row in rows if not (folder / row["file"]).is_file()]:
        raise ValueError(f"{folder} lacks {len(lost)} listed pictures: {', '.join(lost[:5])}")
    return [
        Picture(
            path=folder / row["file"],
            images="given",
            index=index,
            prompt=row.get("prompt") or None,
            subject=row.get("subject") or None,
            seed=row.get("seed"),
            concepts=row.get("concepts") or {},
        )
        for index, row in enumerate(rows)
    ]


def _read_manifest(file: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a manifest, without base twins."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            dict(row.get("concepts") or {})
            if not row["file"].startswith("base/"):
                rows.append(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file}, line {number} is {line[:60]!r}, expected an object with a picture's name"
                ' as "file"'
            ) from error
    return rows


class Pixels(Sequence):
    """Pixels of picture files, uint8 `(H, W, 3)` each, read when they are asked for: tens of
    thousands do not fit in memory at once.

    Raises:
      ValueError: where a file turns out to be damaged.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Pixels(self._paths[index])
        path = self._paths[index]
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except UNREADABLE as error:
            raise ValueError(f"{path} is not a readable picture: {error}") from error


def read_pictures(pictures: Sequence[Picture]) -> Pixels:
    """Their pixels, when they are asked for."""
    return Pixels([picture.path for picture in pictures])


def check_pictures(pictures: Sequence[Picture], of_one_size: bool = True) -> None:
    """Reads every picture once, so that what is wrong is known before anything is scored.

    Raises:
      ValueError: naming the files that are no pictures, or of another size than most.
    """
    sizes, unreadable = [], []
    for picture in pictures:
        try:
            with Image.open(picture.path) as image:
                image.load()
                sizes.append(image.size)
        except UNREADABLE as error:
            unreadable.append(f"{picture.path} ({error})")
    if unreadable:
        raise ValueError(f"{len(unreadable)} unreadable pictures: {'; '.join(unreadable[:5])}")
    usual = collections.Counter(sizes).most_common(1)[0][0]
    odd = [
        f"{picture.path} ({width}x{height})"
        for picture, (width, height) in zip(pictures, sizes, strict=True)
        if (width, height) != usual
    ]
    if odd and of_one_size:
        raise ValueError(
            f"pictures of different sizes: most are {usual[0]}x{usual[1]}, {len(odd)} are not:"
            f" {'; '.join(odd[:5])}; resize them or score them apart"
        )
