"""What an evaluation finds, gathered and saved protocol by protocol."""

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from respodiff_jax.backbone import Clip
from respodiff_jax.evaluation import metrics
from respodiff_jax.evaluation.detectors import Detector
from respodiff_jax.evaluation.pictures import Picture, read_pictures
from respodiff_jax.evaluation.plan import Plan
from respodiff_jax.evaluation.quality import Reference
from respodiff_jax.evaluation.results import (
    Measured,
    Measurement,
    Results,
    save_per_image,
    save_results,
)
from respodiff_jax.evaluation.suites import Suite

_LIBRARIES = (
    "respodiff-jax",
    "jax",
    "jaxlib",
    "flax",
    "diffusers",
    "transformers",
    "numpy",
    "pillow",
)


class Findings:
    """How pictures are judged, and what has been found so far.

    Args:
      out: where it is saved.
      clip: None where nothing needs one.
      suite: prompts and classifiers.
      plan: how much of what.
      made: how the pictures were made, for the record.
      detectors: of unsafe pictures.
      reference: pictures that quality is compared with, or None.
      training: the adapter's training summary, or None.

    Attributes:
      accuracy: of the classifier on plain prompts, attribute -> value -> share.
      inception: what computed the features of FID and KID, or None.
    """

    def __init__(
        self,
        out: pathlib.Path,
        clip: Clip | None,
        suite: Suite,
        plan: Plan,
        made: Mapping[str, Any],
        detectors: Mapping[str, Detector] | None,
        reference: Reference | None,
        training: Mapping[str, Any] | None = None,
    ):
        self.out, self.clip, self.suite, self.plan = out, clip, suite, plan
        self.detectors, self.reference = detectors or {}, reference
        self.inception: Mapping[str, Any] | None = None
        self.accuracy: Mapping[str, Mapping[str, float]] = {}
        self._made, self._training = made, training
        self._measurements: list[Measurement] = []
        self._rows: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._base: dict[tuple, np.ndarray | None] = {}
        self._started = time.monotonic()
        for text in (*plan.notes, *(given.note for given in plan.prompts.values() if given.note)):
            self.note(text)

    def note(self, text: str) -> None:
        """What a reader should know, said at once and kept with the results."""
        warnings.warn(text, stacklevel=2)
        self._notes.append(text)

    def features(self, pictures: Sequence[Picture]) -> np.ndarray:
        return self.clip.image_features(read_pictures(pictures), progress=True)

    def add(
        self,
        protocol: str,
        pictures: Sequence[Picture],
        measured: Sequence[Measured],
        columns: Sequence[Mapping[str, Any]],
    ) -> None:
        """Adds a set's findings; the base's come before the adapted ones', whose change is then
        known from picture to picture."""
        for m, parts in measured:
            key = (m.protocol, m.metric, m.attribute, m.subject)
            base = self._base.setdefault(key, parts) if m.images == "base" else self._base.get(key)
            if m.images == "adapted" and parts is not None and base is not None:
                m = dataclasses.replace(m, change=metrics.mean_interval(parts - base))
            self._measurements.append(m)
        self._rows += [
            picture.row(self.out, protocol) | column
            for picture, column in zip(pictures, columns, strict=True)
        ]

    def save(self) -> Results:
        """Writes what was found so far."""
        suite = self.suite
        results = Results(
            measurements=tuple(self._measurements),
            made=self._made,
            scored={
                "suite": suite.name,
                "clip": self.clip and dict(self.clip.identity),
                "attributes": {name: dict(classes) for name, classes in suite.attributes.items()},
                "target": {name: dict(shares) for name, shares in self.plan.target.items()},
                "accuracy_on_plain_prompts": self.accuracy,
                "detectors": {name: dict(d.identity) for name, d in self.detectors.items()}
                | ({"zero-shot": dict(suite.unsafe_classes)} if suite.unsafe_classes else {}),
                "reference": self.reference and dict(self.reference.identity),
                "inception": self.inception,
            },
            environment=environment() | {"seconds": round(time.monotonic() - self._started, 1)},
            warnings=tuple(self._notes),
            training=self._training,
        )
        save_per_image(self._rows, self.out)
        save_results(results, self.out)
        return results


def environment() -> dict[str, Any]:
    """Versions, hardware and date, for a record."""
    return {
        "versions": {name: _version(name) for name in _LIBRARIES}
        | {"python": platform.python_version()},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(library: str) -> str:
    """Its version; a copy of this package that runs from its folder has none."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
