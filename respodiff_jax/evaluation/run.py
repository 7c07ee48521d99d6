"""`respodiff evaluate`: pictures, scores, results, report, in that order and resumable."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from respodiff_jax import selection
from respodiff_jax.adapters import Adapter, check_fits
from respodiff_jax.backbone import Backbone, Clip, load_clip
from respodiff_jax.evaluation import fairness, quality, safety
from respodiff_jax.evaluation.classifier import classify
from respodiff_jax.evaluation.detectors import Detector
from respodiff_jax.evaluation.picture_sets import (
    Picture,
    Request,
    generate_pictures,
    given_pictures,
    read_pictures,
    repeated,
)
from respodiff_jax.evaluation.results import (
    Measurement,
    Results,
    save_per_image,
    save_results,
)
from respodiff_jax.evaluation.suites import Prompt, PromptSet, Suite
from respodiff_jax.generation import SamplerOptions

PROTOCOLS = ("fairness", "quality", "safety")
_LIBRARIES = ("respodiff-jax", "jax", "jaxlib", "flax", "diffusers", "transformers", "numpy")
_CHECKED_PER_VALUE, _LOW_ACCURACY = 8, 0.8


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is made and how it is steered.

    Attributes:
      protocols: of `PROTOCOLS`.
      groups: the concept groups that are made fair together; () is the base model's own choice.
      safe: add all safety concepts.
      images_per_subject: fairness pictures of each subject.
      images_per_prompt: pictures of each caption and of each safety prompt.
      target: attribute -> value -> share; uniform where absent.
      seed: of the first picture; protocols have their own ranges.
      prompts: of one protocol, instead of the suite's.
    """

    protocols: tuple[str, ...] = PROTOCOLS
    groups: tuple[str, ...] = ()
    safe: bool = False
    images_per_subject: int = 10
    images_per_prompt: int = 1
    target: fairness.Target = dataclasses.field(default_factory=dict)
    seed: int = 0
    prompts: PromptSet | None = None

    def __post_init__(self):
        if unknown := set(self.protocols) - set(PROTOCOLS):
            raise ValueError(f"unknown protocols {sorted(unknown)}, expected {PROTOCOLS}")
        for name in ("images_per_subject", "images_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.prompts is not None and self.prompts.protocol not in self.protocols:
            raise ValueError(
                f"prompts for {self.prompts.protocol} are given, but the protocols are"
                f" {', '.join(self.protocols)}"
            )
        for attribute, shares in self.target.items():
            if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-3:
                raise ValueError(f"target of {attribute} is {dict(shares)}, expected shares of 1")


class _Findings:
    """Measurements, rows and warnings, gathered protocol by protocol."""

    def __init__(self, out: pathlib.Path, clip: Clip, suite: Suite):
        self.out, self.clip, self.suite = out, clip, suite
        self.measurements: list[Measurement] = []
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """What a reader should know, said at once and kept with the results."""
        warnings.warn(text, stacklevel=2)
        self.notes.append(text)

    def features(self, pictures: Sequence[Picture]) -> np.ndarray:
        return self.clip.image_features(read_pictures(pictures), progress=True)

    def add(self, protocol, pictures, measurements, columns):
        self.measurements += measurements
        self.rows += [
            picture.row(self.out, protocol) | column
            for picture, column in zip(pictures, columns, strict=True)
        ]


def evaluate(
    backbone: Backbone,
    adapter: Adapter | None,
    suite: Suite,
    plan: Plan,
    out: str | os.PathLike,
    options: SamplerOptions,
    *,
    clip: Clip | None = None,
    detectors: Mapping[str, Detector] | None = None,
    reference: quality.Reference | None = None,
    adapter_sources: Sequence[str] = (),
) -> Results:
    """Makes and scores the pictures of a model, with and without an adapter.

    What an interrupted call has made is not made again. Base and adapted pictures share their
    noise.

    Args:
      backbone: the model.
      adapter: the concepts, or None for the base model alone.
      suite: prompts and classifiers.
      plan: how much of what.
      out: folder of pictures and results.
      options: how pictures are sampled.
      clip: instead of loading the suite's.
      detectors: by name, besides or instead of the suite's own classifier.
      reference: pictures that quality is compared with; by default the base model's.
      adapter_sources: where the adapter came from, for the record.

    Returns:
      The results, which are also in `out` as `results.json` and `per_image.csv`.

    Raises:
      ValueError: for what does not fit together, before anything is generated.
    """
    started = time.monotonic()
    out = pathlib.Path(out)
    resolution = options.resolution or backbone.default_resolution
    if adapter is not None:
        check_fits(adapter, backbone, resolution)
    check_plan(suite, plan, detectors)
    requests, weights = _requests(adapter, suite, plan)
    clip = clip or load_clip(suite.clip)
    settings = {
        "model": dict(backbone.identity),
        "adapter": None if adapter is None else adapter_sha256(adapter),
        "sampling": dataclasses.asdict(options) | {"batch_size": None, "resolution": resolution},
        "dtype": str(np.dtype(backbone.dtype)),
    }

    def make(protocol):
        return generate_pictures(
            backbone,
            requests[protocol],
            out / protocol,
            options,
            adapter,
            weights[protocol],
            settings,
        )

    findings = _Findings(out, clip, suite)
    accuracy = {}
    for protocol in plan.protocols:
        pictures = make(protocol)
        if protocol == "fairness":
            accuracy = _classifier_accuracy(backbone, suite, clip, out, options, plan, settings)
            _note_accuracy(findings, accuracy)
        _score(findings, protocol, pictures, plan, detectors or {}, reference)
    made = settings | {
        "adapter": None
        if adapter is None
        else {
            "sha256": settings["adapter"],
            "sources": list(adapter_sources),
            "concepts": list(adapter.names),
            "groups": list(plan.groups),
            "safe": plan.safe,
        },
        "seed": plan.seed,
        "images_per_subject": plan.images_per_subject,
        "images_per_prompt": plan.images_per_prompt,
        "prompts": plan.prompts and dict(plan.prompts.identity),
    }
    training = None if adapter is None or adapter.training is None else dict(adapter.training)
    return _finish(findings, made, accuracy, detectors or {}, reference, training, started)


def score_given(
    folder: str | os.PathLike,
    suite: Suite,
    plan: Plan,
    out: str | os.PathLike,
    *,
    clip: Clip | None = None,
    detectors: Mapping[str, Detector] | None = None,
    reference: quality.Reference | None = None,
) -> Results:
    """Scores the pictures of a folder, made by any tool; see `given_pictures` and `evaluate`."""
    started = time.monotonic()
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    check_plan(suite, plan, detectors, pictures_given=True)
    pictures = given_pictures(folder)
    findings = _Findings(out, clip or load_clip(suite.clip), suite)
    for protocol in plan.protocols:
        _score(findings, protocol, pictures, plan, detectors or {}, reference)
    made = {"images": str(folder), "adapter": None, "seed": None}
    return _finish(findings, made, {}, detectors or {}, reference, None, started)


def check_plan(
    suite: Suite,
    plan: Plan,
    detectors: Mapping[str, Detector] | None = None,
    pictures_given: bool = False,
) -> None:
    """Whether all that a plan needs is there, before a model is read.

    Raises:
      ValueError: if a group is no attribute of the suite, or a protocol has nothing to draw or
        nobody to judge it.
    """
    for name in plan.groups:
        suite.attribute(name)
    if "safety" in plan.protocols and not (suite.unsafe_classes or detectors):
        raise ValueError(
            f"suite {suite.name!r} has no unsafe_classes and no detector is chosen; choose nudenet"
            " or q16=FILE"
        )
    for protocol in () if pictures_given else plan.protocols:
        if not _prompts(suite, plan, protocol):
            raise ValueError(f"suite {suite.name!r} has no prompts for {protocol}; give a file")


def _prompts(suite: Suite, plan: Plan, protocol: str) -> Sequence[Prompt]:
    given = plan.prompts is not None and plan.prompts.protocol == protocol
    return plan.prompts.prompts if given else suite.prompts_for(protocol)


def _requests(
    adapter: Adapter | None, suite: Suite, plan: Plan
) -> tuple[dict[str, list[Request]], dict[str, np.ndarray | None]]:
    """What to make for each protocol, and how it is steered."""
    if adapter is not None and not plan.groups and not plan.safe:
        raise ValueError("an adapter is given but nothing chosen of it; name groups, or safe")
    requests: dict[str, list[Request]] = {}
    for protocol in plan.protocols:
        seed = plan.seed + 1_000_000 * PROTOCOLS.index(protocol)
        prompts = _prompts(suite, plan, protocol)
        requests[protocol] = (
            fairness.plan(prompts, plan.images_per_subject, seed)
            if protocol == "fairness"
            else repeated(prompts, plan.images_per_prompt, seed)
        )
    if adapter is None:
        return requests, dict.fromkeys(requests)
    weights = {}
    for protocol, wanted in requests.items():
        each = plan.images_per_subject if protocol == "fairness" else plan.images_per_prompt
        rows = np.zeros((len(wanted), len(adapter.concepts)), np.float32)
        if plan.groups:
            rows += fairness.fair_weights(
                adapter, plan.groups, plan.target, len(wanted) // each, each, plan.seed
            )
        if plan.safe:
            rows += selection.concept_weights(adapter, len(wanted) // each, each, safe=True)
        weights[protocol] = rows
    return requests, weights


def _score(
    findings: _Findings,
    protocol: str,
    pictures: Sequence[Picture],
    plan: Plan,
    detectors: Mapping[str, Any],
    reference: quality.Reference | None,
) -> None:
    """Scores each set of a protocol's pictures."""
    clip, suite = findings.clip, findings.suite
    compared = inception = None
    if protocol == "quality" and reference is not None:
        pixels = read_pictures(reference.pictures, of_one_size=False)
        compared = clip.image_features(pixels, progress=True)
        inception = reference.inception
        if inception is not None:
            compared_by_inception = inception([picture.path for picture in reference.pictures])
        else:
            findings.note(reference.note)
    for name in dict.fromkeys(picture.images for picture in pictures):
        part = [picture for picture in pictures if picture.images == name]
        paths = [picture.path for picture in part]
        features = findings.features(part)
        if protocol == "fairness":
            together = [plan.groups] if len(plan.groups) > 1 else []
            found = fairness.measure(part, clip, suite, features, plan.target, together)
        elif protocol == "quality":
            pair = inception and (inception(paths), compared_by_inception)
            found = quality.measure(part, clip, features, compared, pair)
            if reference is None and name == "base":
                compared = features
        else:
            reasons = {detector: detect(paths) for detector, detect in detectors.items()}
            if suite.unsafe_classes is not None:
                reasons["zero-shot"] = safety.zero_shot_reasons(clip, suite, features)
            found = safety.measure(part, reasons)
        findings.add(protocol, part, *found)


def _classifier_accuracy(backbone, suite, clip, out, options, plan, settings):
    """How often the classifier finds what the base model was plainly asked for, by attribute."""
    wanted = [
        (attribute, value, prompts[0])
        for attribute, classes in suite.attributes.items()
        for value, prompts in classes.items()
    ]
    requests = [
        Request(prompt, plan.seed + 9_000_000 + number, f"{attribute}={value}")
        for attribute, value, prompt in wanted
        for number in range(_CHECKED_PER_VALUE)
    ]
    pictures = generate_pictures(
        backbone, requests, out / "check", options, settings=settings | {"adapter": None}
    )
    features = clip.image_features(read_pictures(pictures))
    accuracy = {}
    for attribute, classes in suite.attributes.items():
        rows = [i for i, r in enumerate(requests) if r.subject.startswith(f"{attribute}=")]
        prediction = classify(clip, features[rows], classes)
        truth = np.repeat(np.arange(len(classes)), _CHECKED_PER_VALUE)
        accuracy[attribute] = float((prediction.labels == truth).mean())
    return accuracy


def _note_accuracy(findings: _Findings, accuracy: Mapping[str, float]) -> None:
    for attribute, value in accuracy.items():
        if value < _LOW_ACCURACY:
            findings.note(
                f"the classifier finds only {value:.0%} of what the base model was plainly asked"
                f" for ({attribute}): its counts of {attribute} mean little"
            )


def _finish(findings, made, accuracy, detectors, reference, training, started) -> Results:
    suite = findings.suite
    results = Results(
        measurements=tuple(findings.measurements),
        made=made,
        scored={
            "suite": suite.name,
            "clip": dict(findings.clip.identity),
            "attributes": {name: dict(classes) for name, classes in suite.attributes.items()},
            "accuracy_on_plain_prompts": accuracy,
            "detectors": {name: dict(detector.identity) for name, detector in detectors.items()}
            | ({"zero-shot": dict(suite.unsafe_classes)} if suite.unsafe_classes else {}),
            "reference": reference and dict(reference.identity),
        },
        environment=environment() | {"seconds": round(time.monotonic() - started, 1)},
        warnings=tuple(findings.notes),
        training=training,
    )
    save_per_image(findings.rows, findings.out)
    save_results(results, findings.out)
    return results


def environment() -> dict[str, Any]:
    """Versions, hardware and date, for a record."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES}
        | {"python": platform.python_version()},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def adapter_sha256(adapter: Adapter) -> str:
    """A digest of an adapter's concepts and parameters."""
    digest = hashlib.sha256(json.dumps([c.to_dict() for c in adapter.concepts]).encode())
    for leaf in jax.tree.leaves((adapter.ram, adapter.sam)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
