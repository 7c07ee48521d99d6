"""Pictures that are there: of a folder that any tool has made, checked, and read when asked for."""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from respodiff_jax.data.prompt_files import SEED, Column, read_table
from respodiff_jax.errors import UserError

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


def given_pictures(folder: str | os.PathLike) -> list[Picture]:
    """The pictures of a folder, made by any tool.

    Prompts and subjects come from `metadata.csv`, with `file`, `prompt` and optionally `subject`,
    `seed`; without one from `manifest.jsonl`, as `respodiff generate` writes it, which knows no
    subjects; without either, the subject of a picture is the name of its subfolder.

    Raises:
      UserError: if there are no pictures, a listed one is missing, or columns are.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of pictures")
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
        raise UserError(f"{folder} has no pictures; expected {', '.join(_SUFFIXES)}")
    if lost := [str(row["file"]) for row in rows if not (folder / row["file"]).is_file()]:
        raise UserError(f"{folder} lacks {len(lost)} listed pictures: {', '.join(lost[:5])}")
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
            raise UserError(
                f"{file}, line {number} is {line[:60]!r}, expected an object with a picture's name"
                ' as "file"'
            ) from error
    return rows


class Pixels(Sequence):
    """Pixels of picture files, uint8 `(H, W, 3)` each, read when they are asked for: tens of
    thousands do not fit in memory at once.

    Raises:
      UserError: where a file turns out to be damaged.
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
            raise UserError(f"{path} is not a readable picture: {error}") from error


def read_pictures(pictures: Sequence[Picture]) -> Pixels:
    """Their pixels, when they are asked for."""
    return Pixels([picture.path for picture in pictures])


def check_pictures(pictures: Sequence[Picture], of_one_size: bool = True) -> None:
    """Reads every picture once, so that what is wrong is known before anything is scored.

    Raises:
      UserError: naming the files that are no pictures, or of another size than most.
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
        raise UserError(f"{len(unreadable)} unreadable pictures: {'; '.join(unreadable[:5])}")
    usual = collections.Counter(sizes).most_common(1)[0][0]
    odd = [
        f"{picture.path} ({width}x{height})"
        for picture, (width, height) in zip(pictures, sizes, strict=True)
        if (width, height) != usual
    ]
    if odd and of_one_size:
        raise UserError(
            f"pictures of different sizes: most are {usual[0]}x{usual[1]}, {len(odd)} are not:"
            f" {'; '.join(odd[:5])}; resize them or score them apart"
        )
