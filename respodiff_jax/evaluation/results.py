"""What an evaluation found: `results.json` and `per_image.csv`.

`results.json` holds, under a schema version, how the pictures were made and scored, and a flat list
of measurements, so that runs can be compared, plotted and reported without knowing the protocols.
`per_image.csv` has a line per picture, from which every measurement follows but the distances of
sets of pictures, which need their features.
"""

import csv
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from respodiff_jax.errors import UserError
from respodiff_jax.storage import write_whole

SCHEMA_VERSION = 2  # 2: `change`; prompts by protocol, accuracy by value, pictures per caption
RESULTS_FILE = "results.json"
PER_IMAGE_FILE = "per_image.csv"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number, of one set of pictures.

    Attributes:
      metric: for example "deviation_ratio", "clip_score", "clip_frechet_distance", "unsafe_rate".
      images: the set of pictures, "base", "adapted", or "given" for pictures made elsewhere.
      value: the number.
      interval: its 95 % confidence interval, or None.
      change: the 95 % interval of its difference from the base pictures, which share their noise
        with these, or None.
      n: pictures that it was computed from.
      protocol: "fairness", "quality" or "safety".
      attribute: what was classified, for example "gender" or "gender x skin_tone", or None.
      subject: the part of the pictures, for example the profession or the I2P category; None is
        all.
      counts: pictures by attribute value, in the attribute's order, or None.
      target: the distribution that the counts are compared with, in that order, or None.
      version: of the metric's definition; raised when its numbers change.
    """

    metric: str
    images: str
    value: float
    n: int
    protocol: str
    interval: tuple[float, float] | None = None
    change: tuple[float, float] | None = None
    attribute: str | None = None
    subject: str | None = None
    counts: Mapping[str, int] | None = None
    target: tuple[float, ...] | None = None
    version: int = 1


# With the numbers that it is the mean of, of pictures or subjects in order; None if it is no mean.
Measured = tuple[Measurement, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Results:
    """All that an evaluation found.

    Attributes:
      measurements: the numbers.
      made: how the pictures were made: model (`Backbone.identity`), adapter (sources, concepts,
        sha256) or None, sampling (steps, guidance, resolution, dtype), seed, prompt files and
        what was asked for (how often, sha256) by protocol.
      scored: by what: CLIP or None, prompts of each attribute and the accuracy on them by value,
        target shares where they are not uniform, detectors and their versions, reference pictures
        and Inception or None.
      environment: versions of this package and its libraries, hardware, date, seconds taken.
      warnings: what a reader should know before believing a number.
      training: the adapter's training summary, or None.
    """

    measurements: tuple[Measurement, ...]
    made: Mapping[str, Any]
    scored: Mapping[str, Any]
    environment: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    training: Mapping[str, Any] | None = None

    def find(self, metric: str, images: str | None = None, **fields: Any) -> list[Measurement]:
        """The measurements of a metric, a set of pictures and any other fields, in order."""
        wanted = {"metric": metric} | ({} if images is None else {"images": images}) | fields
        return [m for m in self.measurements if all(getattr(m, k) == v for k, v in wanted.items())]

    def value(self, metric: str, images: str, **fields: Any) -> float | None:
        """The one measurement's value over all subjects, or None where it was not measured."""
        found = self.find(metric, images, **({"subject": None} | fields))
        return found[0].value if found else None


def save_results(results: Results, out: str | os.PathLike) -> None:
    """Writes `results.json` into a folder, whole or not at all."""
    content = {"schema_version": SCHEMA_VERSION} | dataclasses.asdict(results)
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(pathlib.Path(out) / RESULTS_FILE, text)


def load_results(folder: str | os.PathLike) -> Results:
    """Reads the `results.json` of an evaluation's folder.

    Raises:
      UserError: if there is none, or it is damaged or of a newer schema.
    """
    path = pathlib.Path(folder) / RESULTS_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {RESULTS_FILE}; expected what `respodiff evaluate` wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("schema_version")
        if version > SCHEMA_VERSION:
            raise UserError(
                f"schema_version is {version}, this version of respodiff_jax reads up to"
                f" {SCHEMA_VERSION}; update respodiff_jax"
            )
        content["measurements"] = tuple(map(_measurement, content["measurements"]))
        content["warnings"] = tuple(content["warnings"])
        return Results(**content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _measurement(fields: dict[str, Any]) -> Measurement:
    pairs = ("interval", "change", "target")
    return Measurement(**{k: tuple(v) if v and k in pairs else v for k, v in fields.items()})


def save_per_image(rows: Sequence[Mapping[str, Any]], out: str | os.PathLike) -> None:
    """Writes `per_image.csv`: a line per picture, a column for every key that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(pathlib.Path(out) / PER_IMAGE_FILE, text.getvalue())


def load_per_image(folder: str | os.PathLike) -> list[dict[str, str]]:
    """Reads `per_image.csv`; values are text, empty where a picture has none.

    Raises:
      UserError: if a line is cut short or has too much.
    """
    path = pathlib.Path(folder) / PER_IMAGE_FILE
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(f"{path} is damaged: picture {number} has not as many cells as columns")
    return rows
