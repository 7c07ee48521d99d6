"""The results of an evaluation: `results.json` and `per_image.csv`.

`results.json` has a schema version, how the pictures were made and scored, and a flat list of
measurements. `per_image.csv` has a line for each picture; every measurement follows from these
lines, except the distances between sets of pictures, which need the pictures' features.
"""

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from respodiff_jax.errors import UserError, check_choice
from respodiff_jax.storage import PathLike, checked, read_json, read_text, write_whole

SCHEMA_VERSION = 2
RESULTS_FILE = "results.json"
PER_IMAGE_FILE = "per_image.csv"
PICTURE_SETS = ("base", "adapted", "given")

_KEYS = {"picture_set": "images", "part": "protocol"}  # field -> its key in the files
_FIELDS = {key: field for field, key in _KEYS.items()}

if TYPE_CHECKING:
    from respodiff_jax.adapters import Adapter


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number, measured on one set of pictures.

    Attributes:
      metric: for example "deviation_ratio", "clip_score", "clip_frechet_distance", "unsafe_rate".
      picture_set: "base", "adapted", or "given" for pictures of another tool.
      value: the number.
      n: number of pictures it was computed from.
      part: "fairness", "quality", "safety", "intent", "curves" or "attack".
      interval: 95 % confidence interval of the number, or None.
      change: 95 % confidence interval of the difference from the base pictures, which share their
        noise with these, or None.
      attribute: what was classified, for example "gender" or "gender x skin_tone", or None.
      subject: the profession or I2P category that the number is about, or None for all pictures.
      counts: pictures by attribute value, in the attribute's order, or None.
      target: the shares that the counts are compared with, in the same order, or None.
      judge: the CLIP that judged, if it is not the first; or the one that the first is compared
        with.
      version: version of the metric's definition, raised when the definition changes the numbers.
    """

    metric: str
    picture_set: str
    value: float
    n: int
    part: str
    interval: tuple[float, float] | None = None
    change: tuple[float, float] | None = None
    attribute: str | None = None
    subject: str | None = None
    counts: Mapping[str, int] | None = None
    target: tuple[float, ...] | None = None
    judge: str | None = None
    version: int = 1

    def __post_init__(self):
        check_choice("images", self.picture_set, PICTURE_SETS)
        if self.counts and self.target and len(self.counts) != len(self.target):
            raise UserError(
                f"target has {len(self.target)} shares for counts of {len(self.counts)} values"
            )

    def to_dict(self) -> dict[str, Any]:
        """The measurement with the keys of `results.json`; `judge` only if there is one."""
        fields = dataclasses.asdict(self)
        return {_KEYS.get(f, f): v for f, v in fields.items() if (f, v) != ("judge", None)}


# With one number for each picture or subject, whose mean the measurement is; None if it is no mean.
Measured = tuple[Measurement, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that an evaluation measured.

    Attributes:
      measurements: the numbers.
      made: how the pictures were made: model (`Backbone.identity`), adapter (sources, concepts,
        sha256) or None, sampling (steps, guidance, resolution, dtype), seed, prompt files, and
        number and sha256 of the prompts of each part.
      scored: what scored them: suite and its note on the pictures, CLIP or None, classifier
        prompts of each attribute, the classifier's accuracy for each value, target shares that are
        not uniform, detectors, reference pictures, and Inception or None.
      environment: versions of this package and its libraries, hardware, date, duration in seconds.
      warnings: what a reader should know before believing a number.
      training: the adapter's training summary, or None.
    """

    measurements: tuple[Measurement, ...]
    made: Mapping[str, Any]
    scored: Mapping[str, Any]
    environment: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    training: Mapping[str, Any] | None = None

    def find(self, metric: str, picture_set: str | None = None, **fields: Any) -> list[Measurement]:
        """The first judge's measurements of a metric, or those with the given fields.

        Args:
          metric: name of the metric.
          picture_set: "base", "adapted" or "given"; None is all of them.
          **fields: values of other fields of `Measurement`.
        """
        fields = {"judge": None} | fields
        fields |= {"metric": metric} | ({} if picture_set is None else {"picture_set": picture_set})
        return [m for m in self.measurements if all(getattr(m, k) == v for k, v in fields.items())]

    def value(self, metric: str, picture_set: str, **fields: Any) -> float | None:
        """The number measured over all subjects, or None if it was not measured."""
        found = self.find(metric, picture_set, **({"subject": None} | fields))
        return found[0].value if found else None


def save_results(results: Results, out: PathLike) -> None:
    """Writes `results.json` into a folder, whole or not at all."""
    content = {"schema_version": SCHEMA_VERSION} | dataclasses.asdict(results)
    content["measurements"] = [m.to_dict() for m in results.measurements]
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(pathlib.Path(out) / RESULTS_FILE, text)


def load_results(folder: PathLike) -> Results:
    """Reads the `results.json` of an evaluation's folder.

    Raises:
      UserError: if the file is missing, damaged, or of a newer schema.
    """
    path = pathlib.Path(folder) / RESULTS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} has no {RESULTS_FILE}; expected a folder that `respodiff evaluate` wrote"
        )
    content = read_json(path, "results")
    version = content.pop("schema_version", None) if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{path} has no schema_version; expected a file of `respodiff evaluate`")
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {version}, this respodiff_jax reads up to"
            f" {SCHEMA_VERSION}; update respodiff_jax"
        )
    checked(_Made, content.get("made", {}), f"{path}: made")
    measurements = ()
    if isinstance(content.get("measurements"), list):
        measurements = tuple(
            checked(Measurement, _renamed(m), f"{path}, measurement {number}")
            for number, m in enumerate(content["measurements"], 1)
        )
        content = content | {"measurements": []}
    return dataclasses.replace(checked(Results, content, str(path)), measurements=measurements)


class _MadeAdapter(TypedDict, total=False):
    sha256: str | None
    concepts: list[str]
    groups: list[str]


class _Made(TypedDict, total=False):
    """What pages and cards read of `Results.made`."""

    adapter: _MadeAdapter | None
    model: dict[str, Any] | None


def _renamed(content: Any) -> Any:
    """A measurement of `results.json` with the names of `Measurement`."""
    if not isinstance(content, dict):
        return content
    return {_FIELDS.get(key, key): value for key, value in content.items()}


def save_per_image(rows: Sequence[Mapping[str, Any]], out: PathLike) -> None:
    """Writes `per_image.csv`: a line for each row, a column for every key of any row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(pathlib.Path(out) / PER_IMAGE_FILE, text.getvalue())


def load_per_image(folder: PathLike) -> list[dict[str, str]]:
    """Reads `per_image.csv`; values are text, "" where a picture has none.

    Raises:
      UserError: if a line has fewer or more cells than there are columns, or an unknown set of
        pictures.
    """
    path = pathlib.Path(folder) / PER_IMAGE_FILE
    rows = list(csv.DictReader(io.StringIO(read_text(path, "table"), newline="")))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(f"{path} is damaged: picture {number} has not one cell for each column")
        if "images" in row and row["images"] not in PICTURE_SETS:
            raise UserError(
                f"{path} is damaged: picture {number} has images {row['images']!r:.50}, expected"
                f" one of {', '.join(PICTURE_SETS)}"
            )
    return rows


def overall_metrics(folder: PathLike, adapter: "Adapter") -> list[dict[str, Any]]:
    """The metrics of an evaluation over all pictures, for `export(adapter, metrics=...)`.

    Raises:
      UserError: if the evaluation measured another adapter.
    """
    from respodiff_jax.adapters import adapter_sha256
    from respodiff_jax.adapters.files import METRIC_KEYS

    results = load_results(folder)
    measured = (results.made.get("adapter") or {}).get("sha256")
    if measured != adapter_sha256(adapter):
        raise UserError(
            f"`metrics` {folder} measured another adapter (sha256 {measured}): evaluate the one"
            f" that is exported, {', '.join(adapter.names)}"
        )
    return [
        {key: measurement.to_dict()[key] for key in METRIC_KEYS}
        for measurement in results.measurements
        if measurement.subject is measurement.judge is None
    ]
