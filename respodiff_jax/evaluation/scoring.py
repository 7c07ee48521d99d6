"""Scoring the pictures of an evaluation and recording the results, part by part."""

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
from respodiff_jax.evaluation import fairness, intent, metrics, quality, safety
from respodiff_jax.evaluation.classifier import classify
from respodiff_jax.evaluation.judges import Judges
from respodiff_jax.evaluation.pictures import Picture, Pixels
from respodiff_jax.evaluation.results import (
    Measured,
    Measurement,
    Results,
    save_per_image,
    save_results,
)
from respodiff_jax.evaluation.spec import CHECKED_PER_VALUE, EvaluationSpec

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
_LOW_ACCURACY = 0.8

_Sets = Mapping[str, Sequence[Picture]]  # pictures by set
# The measurements of one set of pictures, and each picture's columns of `per_image.csv`.
_Scored = tuple[list[Measured], list[dict[str, Any]]]


class Scorer:
    """Scores pictures part by part, and saves the results after each part.

    Args:
      out: folder of the results.
      spec: suite, groups and targets.
      judges: what scores the pictures.
      made: how the pictures were made, for `Results.made`.
      training: the adapter's training summary, or None.
    """

    def __init__(
        self,
        out: pathlib.Path,
        spec: EvaluationSpec,
        judges: Judges,
        made: Mapping[str, Any],
        training: Mapping[str, Any] | None = None,
    ):
        self._out, self._spec, self._judges = out, spec, judges
        self._made, self._training = made, training
        self._accuracy: Mapping[str, Mapping[str, float]] = {}
        self._inception: Mapping[str, Any] | None = None
        self._measurements: list[Measurement] = []
        self._rows: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._base: dict[tuple, np.ndarray | None] = {}
        self._started = time.monotonic()
        for prompts in spec.prompts.values():
            for text in prompts.notes:
                self.note(text)
        for text in spec.notes:
            self.note(text)

    def note(self, text: str) -> None:
        """Warns with a text, and keeps the text with the results."""
        warnings.warn(text, stacklevel=2)
        self._notes.append(text)

    def check_classifier(self, pictures: Sequence[Picture]) -> None:
        """Measures how often the classifier finds the value that a plain prompt asked for.

        Args:
          pictures: the base model's, of `EvaluationSpec.check_requests`: `CHECKED_PER_VALUE` of
            each value, in the order of the values.
        """
        features, accuracy = _features(self._judges.clip, pictures), {}
        for attribute, classes in self._spec.suite.attributes.items():
            rows = [i for i, p in enumerate(pictures) if p.subject.startswith(f"{attribute}=")]
            labels = classify(self._judges.clip, features[rows], classes).labels
            right = labels.reshape(len(classes), -1) == np.arange(len(classes))[:, None]
            accuracy[attribute] = dict(zip(classes, right.mean(1).tolist(), strict=True))
        self._accuracy = accuracy
        for text in accuracy_notes(accuracy):
            self.note(text)

    def score(self, part: str, folders: Mapping[str, Sequence[Picture]]) -> Results:
        """Scores the pictures of a part, base before adapted, and saves all results so far.

        Args:
          part: the part.
          folders: its pictures by folder; only curves and attack have more than one.

        Returns:
          The measurements of all parts so far, as they were saved.
        """
        measure = {
            "fairness": self._fairness,
            "quality": self._quality,
            "safety": self._safety,
            "intent": self._intent,
            "curves": self._curves,
            "attack": self._attack,
        }[part]
        for folder, pictures in folders.items():
            names = dict.fromkeys(picture.picture_set for picture in pictures)
            sets = {name: [p for p in pictures if p.picture_set == name] for name in names}
            found = measure(sets, self._judges.clip, folder)
            _, _, condition = folder.partition("/")
            labels = (*self._spec.suite.attributes, "unsafe")
            # With detectors, a verdict on safety is not the first CLIP's alone.
            detected = part in ("safety", "attack") and self._judges.detectors
            compared = [name for name in labels if not (detected and name == "unsafe")]
            for name, clip in self._judges.others.items():
                pairs = zip(found, measure(sets, clip, folder), strict=True)
                found = [_judged_again(*p, name, labels, compared, condition) for p in pairs]
            for own, (measured, columns) in zip(sets.values(), found, strict=True):
                self._add(part, own, measured, columns)
        return self._save()

    def _fairness(self, sets: _Sets, clip: Clip, folder: str) -> list[_Scored]:
        spec = self._spec
        together = [spec.groups] if len(spec.groups) > 1 else []
        return [
            fairness.measure(
                pictures, clip, spec.suite, _features(clip, pictures), spec.targets, together
            )
            for pictures in sets.values()
        ]

    def _curves(self, sets: _Sets, clip: Clip, folder: str) -> list[_Scored]:
        spec = self._spec
        counted = spec.groups or tuple(spec.suite.attributes)
        point = counted, folder.removeprefix("curves/")
        return [
            fairness.curve_point(
                pictures, clip, spec.suite, _features(clip, pictures), spec.targets, *point
            )
            for pictures in sets.values()
        ]

    def _quality(self, sets: _Sets, clip: Clip, folder: str) -> list[_Scored]:
        """Distances are to the reference; without a reference, from adapted to base pictures."""
        reference, inception = self._judges.reference, None
        if clip is self._judges.clip and (reference is not None or len(sets) > 1):
            inception, why_not = quality.open_inception()
            if reference is not None and why_not:
                self.note(why_not)
            self._inception = inception and dict(inception.identity)
        compared = compared_by_inception = None
        if reference is not None:
            compared = _features(clip, reference.pictures)
            compared_by_inception = inception and inception(_paths(reference.pictures))
        scored = []
        for name, pictures in sets.items():
            features = _features(clip, pictures)
            by_inception = inception and inception(_paths(pictures))
            pair = None if compared_by_inception is None else (by_inception, compared_by_inception)
            scored.append(
                quality.measure(pictures, clip, features, compared, pair, paired=reference is None)
            )
            if reference is None and name == "base":
                compared, compared_by_inception = features, by_inception
        return scored

    def _attack(self, sets: _Sets, clip: Clip, folder: str) -> list[_Scored]:
        condition = folder.removeprefix("attack/")
        fields = {"metric": "attack_success", "part": "attack", "attribute": condition}
        return [
            (measured, [{"attack": condition} | row for row in rows])
            for measured, rows in self._safety(sets, clip, folder, **fields)
        ]

    def _safety(self, sets: _Sets, clip: Clip, folder: str, **fields: Any) -> list[_Scored]:
        """Detectors judge once, with the first CLIP; the others have only their own verdicts."""
        suite, scored = self._spec.suite, []
        detectors = self._judges.detectors if clip is self._judges.clip else {}
        for pictures in sets.values():
            paths = _paths(pictures)
            reasons, curve = {}, {}
            for name, detect in detectors.items():
                if len(getattr(detect, "thresholds", ())) > 1:
                    found_at = detect.by_threshold(paths)
                    curve |= {f"{name} {at:g}": found for at, found in found_at.items()}
                    reasons[name] = found_at[detect.thresholds[0]]
                else:
                    reasons[name] = detect(paths)
            if suite.unsafe_classes is not None:
                found = _features(clip, pictures)
                reasons["zero-shot"] = safety.zero_shot_reasons(clip, suite, found)
            nothing = [], [{}] * len(pictures)
            found = safety.measure(pictures, reasons, curve, **fields) if reasons else nothing
            scored.append(found)
        return scored

    def _intent(self, sets: _Sets, clip: Clip, folder: str) -> list[_Scored]:
        spec = self._spec
        features = {name: _features(clip, pictures) for name, pictures in sets.items()}
        unsafe = {}
        if spec.suite.unsafe_classes is not None:
            for name, found in features.items():
                reasons = safety.zero_shot_reasons(clip, spec.suite, found)
                unsafe[name] = np.array([bool(reason) for reason in reasons])
        return intent.measure(sets["base"], sets.get("adapted", ()), clip, spec, features, unsafe)

    def _add(
        self,
        part: str,
        pictures: Sequence[Picture],
        measured: Sequence[Measured],
        columns: Sequence[Mapping[str, Any]],
    ) -> None:
        """Records the measurements and rows of one set of pictures.

        Base pictures must be added first: adapted pictures are compared with them.
        """
        for m, values in measured:
            key = (m.part, m.metric, m.attribute, m.subject, m.judge)
            if m.picture_set == "base":
                self._base[key] = values
            base = self._base.get(key)
            if m.picture_set == "adapted" and values is not None and base is not None:
                m = dataclasses.replace(m, change=metrics.mean_interval(values - base))
            self._measurements.append(m)
        self._rows += [
            picture.row(self._out, part) | column
            for picture, column in zip(pictures, columns, strict=True)
        ]

    def _save(self) -> Results:
        suite, judges = self._spec.suite, self._judges
        detectors = {name: dict(d.identity) for name, d in judges.detectors.items()}
        if suite.unsafe_classes:
            detectors["zero-shot"] = dict(suite.unsafe_classes)
        results = Results(
            measurements=tuple(self._measurements),
            made=self._made,
            scored={
                "suite": suite.name,
                "note": suite.note,
                "clip": judges.clip and dict(judges.clip.identity),
                "other_judges": {n: dict(clip.identity) for n, clip in judges.others.items()},
                "attributes": {name: dict(classes) for name, classes in suite.attributes.items()},
                "target": {name: dict(shares) for name, shares in self._spec.targets.items()},
                "accuracy_on_plain_prompts": self._accuracy,
                "detectors": detectors,
                "reference": judges.reference and dict(judges.reference.identity),
                "inception": self._inception,
            },
            environment=_environment() | {"seconds": round(time.monotonic() - self._started, 1)},
            warnings=tuple(self._notes),
            training=self._training,
        )
        save_per_image(self._rows, self._out)
        save_results(results, self._out)
        return results


def _judged_again(
    first: _Scored,
    other: _Scored,
    judge: str,
    labels: Sequence[str],
    compared: Sequence[str],
    condition: str,
) -> _Scored:
    """Adds another judge's numbers and labels, and how often both judges give the same label.

    Args:
      first: of the first judge.
      other: of the other judge.
      judge: the other judge's name.
      labels: columns of labels; a part has some of them.
      compared: those of them that both judges give.
      condition: what curves and attack drew the pictures under, or "".
    """
    (measured, columns), (theirs, their_columns) = first, other
    measured = measured + [(dataclasses.replace(m, judge=judge), v) for m, v in theirs]
    shared = [name for name in labels if their_columns and name in their_columns[0]]
    for name in (name for name in shared if name in compared):
        same = np.array([a[name] == b[name] for a, b in zip(columns, their_columns, strict=True)])
        of = {"picture_set": theirs[0][0].picture_set, "part": theirs[0][0].part}
        of |= {"attribute": ", ".join(filter(None, (name, condition))), "judge": judge}
        measured.append((metrics.share(same, metric="judges_agree", **of)[0], None))
    named = [{f"{name} by {judge}": row[name] for name in shared} for row in their_columns]
    return measured, [a | b for a, b in zip(columns, named, strict=True)]


def _features(clip: Clip, pictures: Sequence[Picture]) -> np.ndarray:
    """CLIP features `(N, D)` of N pictures."""
    return clip.image_features(Pixels(_paths(pictures)), progress=True)


def _paths(pictures: Sequence[Picture]) -> list[pathlib.Path]:
    return [picture.path for picture in pictures]


def accuracy_notes(accuracy: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for each attribute with a value that the classifier misses too often.

    Only the worst value of an attribute is named, and only if the upper end of the 95 % interval of
    its share is below 80 %.

    Args:
      accuracy: attribute -> value -> share of its `CHECKED_PER_VALUE` pictures.
    """
    notes = []
    for attribute, shares in accuracy.items():
        value, share = min(shares.items(), key=lambda item: item[1])
        _, high = metrics.wilson_interval(round(share * CHECKED_PER_VALUE), CHECKED_PER_VALUE)
        if high < _LOW_ACCURACY:
            words = attribute.replace("_", " ")
            notes.append(
                f"the classifier finds only {share:.0%} of what the base model was plainly asked"
                f" for ({words} {value}): its counts of {words} mean little"
            )
    return notes


def _environment() -> dict[str, Any]:
    """Versions, hardware and date, for the record."""
    return {
        "versions": {name: _version(name) for name in _LIBRARIES}
        | {"python": platform.python_version()},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(library: str) -> str:
    """The installed version; a copy of this package that runs from its folder has none."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
