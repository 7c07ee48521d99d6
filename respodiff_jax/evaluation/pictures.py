"""Pictures that exist as files: found in a folder, checked, and read only when needed."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from respodiff_jax.data.prompt_files import SEED, Column, read_table
from respodiff_jax.errors import UserError
from respodiff_jax.storage import PathLike, read_objects

_METADATA = {
    "file": Column(),
    "prompt": Column(may_be_blank=True),
    "subject": Column(required=False),
    "seed": SEED,
}
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Pillow raises these for files that are not pictures, are damaged, or are too large to open safely.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture file and how it was made.

    Attributes:
      path: the file.
      picture_set: "base", "adapted", or "given" for a picture of another tool.
      index: number within the set; base and adapted pictures of one index share their noise.
      prompt: the prompt, or None if unknown.
      subject: what the picture is counted under, for example a profession, or None.
      seed: the seed, or None if unknown.
      concepts: weight of each concept that steered the picture.
    """

    path: pathlib.Path
    picture_set: str
    index: int
    prompt: str | None
    subject: str | None
    seed: int | None = None
    concepts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def row(self, out: pathlib.Path, part: str) -> dict[str, Any]:
        """The picture's line of `per_image.csv` in the folder `out`, without scores."""
        return {
            "file": os.path.relpath(self.path.resolve(), out.resolve()),
            "protocol": part,
            "images": self.picture_set,
            "index": self.index,
            "prompt": self.prompt,
            "subject": self.subject,
            "seed": self.seed,
            "concepts": "; ".join(f"{name}={weight:g}" for name, weight in self.concepts.items()),
        }


def find_pictures(folder: PathLike) -> list[Picture]:
    """Finds the pictures of a folder that any tool made.

    Prompts and subjects come from `metadata.csv` with the columns `file`, `prompt` and optionally
    `subject` and `seed`. Without that file they come from the `manifest.jsonl` of
    `respodiff generate`, which has no subjects. Without both, a picture's subject is the name of
    its subfolder.

    Raises:
      UserError: if there are no pictures, or a listed picture or a column is missing.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of pictures")
    if (folder / "metadata.csv").is_file():
        rows = read_table(folder / "metadata.csv", _METADATA)
    elif (folder / "manifest.jsonl").is_file():
        rows = _read_manifest(folder / "manifest.jsonl")
    else:
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES)
        rows = [
            {
                "file": file.relative_to(folder),
                "subject": None if file.parent == folder else file.parent.name,
            }
            for file in files
        ]
    if not rows:
        raise UserError(f"{folder} has no pictures; expected {', '.join(_SUFFIXES)}")
    if lost := [str(row["file"]) for row in rows if not (folder / row["file"]).is_file()]:
        raise UserError(f"{folder} lacks {len(lost)} listed pictures: {', '.join(lost[:5])}")
    return [
        Picture(
            path=folder / row["file"],
            picture_set="given",
            index=index,
            prompt=row.get("prompt") or None,
            subject=row.get("subject") or None,
            seed=row.get("seed"),
            concepts=row.get("concepts") or {},
        )
        for index, row in enumerate(rows)
    ]


def _read_manifest(file: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a manifest, without the base model's twins."""
    rows = read_objects(file, "manifest")
    for where, row in rows:
        if not (isinstance(row.get("file"), str) and isinstance(row.get("concepts") or {}, dict)):
            raise UserError(f'{where} is {row!r:.60}, expected a picture\'s name as "file"')
    return [row for _, row in rows if not row["file"].startswith("base/")]


class Pixels(Sequence):
    """Pixels of picture files, each uint8 `(height, width, 3)`.

    A picture is read when it is indexed: tens of thousands do not fit in memory at once.

    Raises:
      UserError: on indexing, if the file is damaged.
    """

    def __init__(self, paths: Sequence[PathLike]):
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


def check_pictures(pictures: Sequence[Picture], of_one_size: bool = True) -> None:
    """Reads every picture once, to find damaged files before anything is scored.

    Raises:
      UserError: naming the files that are not pictures, or whose size differs from most.
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
