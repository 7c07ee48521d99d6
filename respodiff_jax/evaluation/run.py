"""`respodiff evaluate`: pictures, scores, results, report, in that order and resumable."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from respodiff_jax.adapters import Adapter, check_fits
from respodiff_jax.backbone import Backbone, Clip, load_clip
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import fairness, metrics, quality, safety
from respodiff_jax.evaluation.classifier import classify
from respodiff_jax.evaluation.detectors import Detector
from respodiff_jax.evaluation.findings import Findings
from respodiff_jax.evaluation.picture_sets import Request, check_folder, generate_pictures
from respodiff_jax.evaluation.pictures import Picture, check_pictures, given_pictures
from respodiff_jax.evaluation.plan import CHECK_SEED, Plan, check_plan
from respodiff_jax.evaluation.results import RESULTS_FILE, Results, load_results
from respodiff_jax.evaluation.suites import Suite
from respodiff_jax.generation.sampling import SamplerOptions
from respodiff_jax.storage import local_path

_CHECKED_PER_VALUE, _LOW_ACCURACY = 8, 0.8

Accuracy = Mapping[str, Mapping[str, float]]  # attribute -> value -> share


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
    noise. Results are written after each protocol.

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
      UserError: for what does not fit together, before anything is generated.
    """
    out = local_path(out, "output folder")
    resolution = options.resolution or backbone.default_resolution
    if adapter is not None:
        check_fits(adapter, backbone, resolution)
    requests, weights = check_plan(suite, plan, adapter, detectors or ())
    check_out(out, plan)
    settings = {
        "model": dict(backbone.identity) | {"parts_sha256": _parts_sha256(backbone)},
        "adapter": None if adapter is None else adapter_sha256(adapter),
        "sampling": dataclasses.asdict(options) | {"batch_size": None, "resolution": resolution},
        "dtype": str(np.dtype(backbone.dtype)),
    }
    plain_settings = settings | {"adapter": None}
    if "fairness" in plan.protocols:
        check_folder(out / "check", _plain_requests(suite, plan), settings=plain_settings)
    for protocol in plan.protocols:
        check_folder(out / protocol, requests[protocol], weights[protocol], settings)
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
        "images_per_caption": plan.images_per_caption,
        "images_per_prompt": plan.images_per_prompt,
        "prompts": {protocol: dict(given.identity) for protocol, given in plan.prompts.items()},
        "pictures": {protocol: _digest(wanted) for protocol, wanted in requests.items()},
    }
    training = None if adapter is None or adapter.training is None else dict(adapter.training)
    if clip is None and needs_clip(suite, plan):
        clip = load_clip(suite.clip)
    findings = Findings(out, clip, suite, plan, made, detectors, reference, training)
    for protocol in plan.protocols:
        if protocol == "fairness":
            _check_classifier(findings, backbone, options, plain_settings)
        pictures = generate_pictures(
            backbone,
            requests[protocol],
            out / protocol,
            options,
            adapter,
            weights[protocol],
            settings,
        )
        _SCORE[protocol](findings, _by_set(pictures))
        results = findings.save()
    return results


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
    out = local_path(out, "output folder")
    pictures = given_pictures(folder)
    check_plan(suite, plan, None, detectors or (), pictures)
    check_pictures(pictures)
    check_out(out, plan)
    out.mkdir(parents=True, exist_ok=True)
    if clip is None and needs_clip(suite, plan):
        clip = load_clip(suite.clip)
    made = {"images": str(folder), "adapter": None, "seed": None}
    findings = Findings(out, clip, suite, plan, made, detectors, reference)
    for protocol in plan.protocols:
        if protocol == "fairness":
            for text in fairness.check_subjects(pictures, suite.subjects):
                findings.note(text)
            findings.note(
                "the classifier was not checked: nothing is known of what it makes of the model"
                " that drew these pictures"
            )
        _SCORE[protocol](findings, _by_set(pictures))
        results = findings.save()
    return results


def needs_clip(suite: Suite, plan: Plan) -> bool:
    """Whether anything is scored by CLIP; detectors of unsafe pictures bring what they need."""
    return suite.unsafe_classes is not None or plan.protocols != ("safety",)


def check_out(out: str | os.PathLike, plan: Plan) -> None:
    """Whether the results of a plan may be written to a folder.

    Raises:
      UserError: if results of other protocols are there, which would be lost, or it is no folder
        of this machine.
    """
    if not (local_path(out, "output folder") / RESULTS_FILE).is_file():
        return
    there = {m.protocol for m in load_results(out).measurements}
    if lost := sorted(there - set(plan.protocols)):
        raise UserError(
            f"{out} holds results of {', '.join(lost)}, which would be lost; choose another --out,"
            " or evaluate all in one run"
        )


def _by_set(pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    """Pictures of the base model before adapted ones."""
    names = dict.fromkeys(picture.images for picture in pictures)
    return {name: [p for p in pictures if p.images == name] for name in names}


def _paths(pictures: Sequence[Picture]) -> list[pathlib.Path]:
    return [picture.path for picture in pictures]


def _score_fairness(findings: Findings, sets: Mapping[str, Sequence[Picture]]) -> None:
    groups = findings.plan.groups
    together = [groups] if len(groups) > 1 else []
    for pictures in sets.values():
        features = findings.features(pictures)
        found = fairness.measure(
            pictures, findings.clip, findings.suite, features, findings.plan.target, together
        )
        findings.add("fairness", pictures, *found)


def _score_quality(findings: Findings, sets: Mapping[str, Sequence[Picture]]) -> None:
    """With distances to the reference pictures or, of adapted pictures, to the base model's."""
    reference = findings.reference
    inception = None
    if reference is not None or len(sets) > 1:
        inception, why_not = quality.open_inception()
        if reference is not None and why_not:
            findings.note(why_not)
        findings.inception = inception and dict(inception.identity)
    compared = compared_by_inception = None
    if reference is not None:
        compared = findings.features(reference.pictures)
        compared_by_inception = inception and inception(_paths(reference.pictures))
    for name, pictures in sets.items():
        features = findings.features(pictures)
        by_inception = inception and inception(_paths(pictures))
        pair = None if compared_by_inception is None else (by_inception, compared_by_inception)
        found = quality.measure(
            pictures, findings.clip, features, compared, pair, paired=reference is None
        )
        findings.add("quality", pictures, *found)
        if reference is None and name == "base":
            compared, compared_by_inception = features, by_inception


def _score_safety(findings: Findings, sets: Mapping[str, Sequence[Picture]]) -> None:
    suite = findings.suite
    for pictures in sets.values():
        paths = _paths(pictures)
        reasons = {name: detect(paths) for name, detect in findings.detectors.items()}
        if suite.unsafe_classes is not None:
            features = findings.features(pictures)
            reasons["zero-shot"] = safety.zero_shot_reasons(findings.clip, suite, features)
        findings.add("safety", pictures, *safety.measure(pictures, reasons))


_SCORE = {"fairness": _score_fairness, "quality": _score_quality, "safety": _score_safety}


def _check_classifier(
    findings: Findings,
    backbone: Backbone,
    options: SamplerOptions,
    settings: Mapping[str, Any],
) -> None:
    """How often the classifier finds what the base model was plainly asked for, before many
    pictures are drawn that it is to count."""
    suite = findings.suite
    requests = _plain_requests(suite, findings.plan)
    folder = findings.out / "check"
    pictures = generate_pictures(backbone, requests, folder, options, settings=settings)
    features = findings.features(pictures)
    accuracy = {}
    for attribute, classes in suite.attributes.items():
        rows = [i for i, r in enumerate(requests) if r.subject.startswith(f"{attribute}=")]
        labels = classify(findings.clip, features[rows], classes).labels
        right = labels.reshape(len(classes), -1) == np.arange(len(classes))[:, None]
        accuracy[attribute] = dict(zip(classes, right.mean(1).tolist(), strict=True))
    findings.accuracy = accuracy
    for text in accuracy_notes(accuracy):
        findings.note(text)


def _plain_requests(suite: Suite, plan: Plan) -> list[Request]:
    """Pictures of each value of each attribute, asked for by the first prompt that describes it."""
    return [
        Request(prompts[0], plan.seed + CHECK_SEED + number, f"{attribute}={value}")
        for attribute, classes in suite.attributes.items()
        for value, prompts in classes.items()
        for number in range(_CHECKED_PER_VALUE)
    ]


def accuracy_notes(accuracy: Accuracy) -> list[str]:
    """A sentence for each attribute of which the classifier surely misses a value too often."""
    worst = {name: min(of.items(), key=lambda item: item[1]) for name, of in accuracy.items()}
    return [
        f"the classifier finds only {share:.0%} of what the base model was plainly asked for"
        f" ({words} {value}): its counts of {words} mean little"
        for words, (value, share) in ((name.replace("_", " "), w) for name, w in worst.items())
        if metrics.wilson_interval(share * _CHECKED_PER_VALUE, _CHECKED_PER_VALUE)[1]
        < _LOW_ACCURACY
    ]


def adapter_sha256(adapter: Adapter) -> str:
    """A digest of an adapter's concepts and parameters."""
    digest = hashlib.sha256(json.dumps([c.to_dict() for c in adapter.concepts]).encode())
    for leaf in jax.tree.leaves((adapter.ram, adapter.sam)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _digest(requests: Sequence[Request]) -> dict[str, Any]:
    """How many pictures are asked for, and a digest of what is asked for in each."""
    text = json.dumps([[request.prompt, request.subject] for request in requests])
    return {"count": len(requests), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _parts_sha256(backbone: Backbone) -> str:
    """A digest of what a model's pictures depend on besides its UNet's files: the scheduler's
    config, and the first numbers of every parameter, since reading all takes long."""
    digest = hashlib.sha256(json.dumps(dict(backbone.scheduler_config), sort_keys=True).encode())
    for leaf in map(np.asarray, jax.tree.leaves(backbone.params)):
        digest.update(leaf[(0,) * (leaf.ndim - 1)].tobytes())
    return digest.hexdigest()
