"""Fairness: do pictures of a profession show women and men, light and dark skin alike?

The WinoBias protocol (paper, section 5.1): pictures of every profession under every template,
counted by zero-shot classification; the deviation ratio per profession and its mean. WinoAlign is
the CLIP score of the same pictures and their prompts.

Deviation: the classifier's prompts are the authors' but for "an Asian-race person", which is "a
Asian-race person" with them.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from respodiff_jax.adapters import Adapter
from respodiff_jax.backbone import Clip
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import metrics
from respodiff_jax.evaluation.classifier import Prediction, classify, intersect
from respodiff_jax.evaluation.picture_sets import Request, request
from respodiff_jax.evaluation.pictures import Picture
from respodiff_jax.evaluation.quality import clip_scores
from respodiff_jax.evaluation.results import Measured, Measurement
from respodiff_jax.evaluation.suites import Prompt, Suite
from respodiff_jax.generation.selection import fair_assignment

Target = Mapping[str, Mapping[str, float]]  # attribute -> value -> share

# Weights of the groups where two are steered at once; the authors' (gender, then race).
INTERSECTION_WEIGHTS = (0.6, 0.4)


def plan(prompts: Sequence[Prompt], images_per_subject: int, seed: int) -> list[Request]:
    """`images_per_subject` requests per subject, one subject after the other, each taking its
    prompts in turn; seeds count up."""
    subjects: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        subjects.setdefault(prompt.subject, []).append(prompt)
    requests: list[Request] = []
    for own in subjects.values():
        for number in range(images_per_subject):
            again, which = divmod(number, len(own))
            requests.append(request(own[which], again, seed + len(requests)))
    return requests


def fair_weights(
    adapter: Adapter,
    groups: Sequence[str],
    target: Target,
    requests: Sequence[Request],
    images_per_subject: int,
    seed: int,
) -> np.ndarray:
    """Weight of each concept in each picture: of every group one, all combinations in their shares.

    The shares are met within every subject and, as far as they go, under each of its prompts: the
    paper's 150 pictures of a profession are 2 concepts x 15 x 5 templates, or 3 x 10 x 5. A concept
    is added at its default scale.

    Args:
      adapter: the concepts.
      groups: one group, or several that are steered at once.
      target: group -> value -> share; uniform where absent. A concept is the one of a value when it
        has the value's words in its name: "a woman" of "woman".
      requests: of P subjects, M of each following each other, its prompts in turn.
      images_per_subject: M.
      seed: of the assignment's order.

    Returns:
      float32 `(P * M, N)`.

    Raises:
      UserError: if the adapter has no such group, or only one concept in it, or it is not clear
        which concept is whose share.
    """
    members = []
    for group in groups:
        found = [i for i, c in enumerate(adapter.concepts) if c.group == group and not c.is_safety]
        if len(found) < 2:
            known = sorted({c.group for c in adapter.concepts if not c.is_safety})
            raise UserError(
                f"the adapter has {len(found)} concept(s) of the group {group!r}, expected two or"
                f" more; its groups are {known}"
            )
        members.append(found)
    shares = [
        [1 / len(found)] * len(found)
        if group not in target
        else _concept_shares(group, [adapter.names[i] for i in found], target[group])
        for group, found in zip(groups, members, strict=True)
    ]
    factors = [1.0] if len(groups) == 1 else _intersection_weights(len(groups))
    combinations = list(itertools.product(*members))
    ratios = [math.prod(chosen) for chosen in itertools.product(*shares)]
    num_subjects = len(requests) // images_per_subject
    picks = fair_assignment(images_per_subject, num_subjects, ratios, seed)
    prompts = np.array([r.prompt for r in requests]).reshape(picks.shape)
    rng = np.random.default_rng([seed, 1])  # other numbers than those of the assignment
    for own, own_prompts in zip(picks, prompts, strict=True):
        # Sorted, a combination's pictures go round the prompts, as many to each; then the order
        # under each prompt is by lot.
        order = rng.permutation(len(combinations))
        own[:] = own[np.argsort(order[own])]
        for prompt in dict.fromkeys(own_prompts.tolist()):
            rows = np.flatnonzero(own_prompts == prompt)
            own[rows] = rng.permutation(own[rows])
    weights = np.zeros((len(requests), len(adapter.concepts)), np.float32)
    for row, pick in enumerate(picks.reshape(-1)):
        for concept, factor in zip(combinations[pick], factors, strict=True):
            weights[row, concept] += factor * adapter.default_scales[concept]
    return weights


def _concept_shares(group: str, names: Sequence[str], shares: Mapping[str, float]) -> list[float]:
    """Each concept's share, by the value whose words are in its name."""

    def words(text):
        return set(re.findall(r"\w+", text.lower()))

    concepts: dict[str, list[str]] = {value: [] for value in shares}
    for name in names:
        values = [value for value in shares if words(value) <= words(name)]
        if len(values) != 1:
            raise UserError(
                f"target of {group}: concept {name!r} fits the values {values} of {list(shares)},"
                " expected exactly one; name the suite's values by words of the concepts"
            )
        concepts[values[0]].append(name)
    for value, found in concepts.items():
        if shares[value] > 0 and len(found) != 1:
            raise UserError(
                f"target of {group}: {value!r} is to have {shares[value]:g} of the pictures and"
                f" fits the concepts {found} of {list(names)}, expected exactly one; use an"
                " adapter with one concept for each value, or a target that this one can reach"
            )
    share_of = {name: shares[value] for value, found in concepts.items() for name in found}
    return [share_of[name] for name in names]


def _intersection_weights(count: int) -> Sequence[float]:
    return INTERSECTION_WEIGHTS if count == 2 else [1 / count] * count


def check_subjects(pictures: Sequence[Picture], expected: Sequence[str]) -> list[str]:
    """What is odd about the subjects of pictures made elsewhere, in sentences.

    Args:
      pictures: all of them.
      expected: the subjects that the protocol asks for.

    Raises:
      UserError: if no picture has a subject: nothing could be counted.
    """
    found = {picture.subject for picture in pictures} - {None}
    if not found:
        raise UserError(
            "no picture has a subject, so that none can be counted; put them into a folder for each"
            " profession, or list them in metadata.csv with the columns file, prompt, subject"
        )
    notes = []
    if missing := [name for name in expected if name not in found]:
        notes.append(
            f"{len(missing)} of {len(expected)} subjects have no pictures and are not in the mean:"
            f" {_some(missing)}"
        )
    if unknown := sorted(found - set(expected)):
        notes.append(
            f"{len(unknown)} subjects are not the suite's, and counted as they are named:"
            f" {_some(unknown)}"
        )
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def measure(
    pictures: Sequence[Picture],
    clip: Clip,
    suite: Suite,
    features: np.ndarray,
    target: Target,
    intersections: Sequence[Sequence[str]] = (),
) -> tuple[list[Measured], list[dict[str, object]]]:
    """Scores one set of pictures.

    Args:
      pictures: of one set; those without a subject are scored but not counted.
      clip: classifier and score.
      suite: attributes and prompts.
      features: the pictures' CLIP features, `(N, D)`.
      target: attribute -> value -> share; uniform where absent.
      intersections: attributes to be counted together.

    Returns:
      measurements with what they are means of, and columns for `per_image.csv`.
    """
    predictions = {
        name: classify(clip, features, classes) for name, classes in suite.attributes.items()
    }
    columns: list[dict[str, object]] = [{} for _ in pictures]
    for name, prediction in predictions.items():
        for i, column in enumerate(columns):
            column[name] = prediction.values[prediction.labels[i]]
            column[f"{name}_probability"] = round(float(prediction.probabilities[i]), 4)
    counted = {(name,): prediction for name, prediction in predictions.items()} | {
        tuple(names): intersect({name: predictions[name] for name in names})
        for names in intersections
    }
    subjects = np.array([picture.subject or "" for picture in pictures])
    images = pictures[0].images
    found = []
    for names, prediction in counted.items():
        shares = _target_shares(names, suite, target)
        found += _deviation_ratios(images, " x ".join(names), prediction, subjects, shares)
    found += _alignment(pictures, clip, features, subjects, columns)
    if suite.subject_classes is not None:
        found += _recognition(images, clip, suite, features, subjects, columns)
    return found, columns


def _target_shares(names: Sequence[str], suite: Suite, target: Target) -> tuple[float, ...]:
    """Of all combinations of the attributes' values, in the order of `intersect`."""
    shares = []
    for name in names:
        values = list(suite.attribute(name))
        wanted = target.get(name, dict.fromkeys(values, 1 / len(values)))
        shares.append([wanted[value] for value in values])
    return tuple(math.prod(each) for each in itertools.product(*shares))


def _deviation_ratios(
    images: str,
    attribute: str,
    prediction: Prediction,
    subjects: np.ndarray,
    target: tuple[float, ...],
) -> list[Measured]:
    """Of every subject, and their mean."""
    names = [name for name in dict.fromkeys(subjects.tolist()) if name]
    if not names:
        return []
    members = {name: np.flatnonzero(subjects == name) for name in names}
    counts = {name: prediction.counts(rows) for name, rows in members.items()}
    ratios = np.array([metrics.deviation_ratio([*c.values()], target) for c in counts.values()])
    common = {
        "metric": "deviation_ratio",
        "images": images,
        "protocol": "fairness",
        "attribute": attribute,
        "target": target,
    }
    counted = np.flatnonzero(subjects != "")
    # The mean's interval is over subjects: resampled pictures of a subject deviate more than the
    # pictures themselves, so that theirs would lie above the mean.
    overall = Measurement(
        value=float(ratios.mean()),
        interval=metrics.mean_interval(ratios),
        n=len(counted),
        counts=prediction.counts(counted),
        **common,
    )
    of_subjects = (
        Measurement(
            value=value,
            interval=metrics.deviation_interval([*counts[name].values()], target),
            n=len(members[name]),
            counts=counts[name],
            subject=name,
            **common,
        )
        for name, value in zip(names, ratios.tolist(), strict=True)
    )
    return [(overall, ratios), *((m, None) for m in of_subjects)]


def _alignment(pictures, clip, features, subjects, columns) -> list[Measured]:
    """WinoAlign: the mean CLIP score of the pictures whose prompts are known."""
    rows = [i for i, picture in enumerate(pictures) if picture.prompt]
    if not rows:
        return []
    scores = clip_scores([pictures[i] for i in rows], clip, features[rows])
    for i, score in zip(rows, scores, strict=True):
        columns[i]["clip_score"] = round(float(score), 4)
    found = Measurement(
        metric="winoalign",
        images=pictures[0].images,
        protocol="fairness",
        value=float(scores.mean()),
        interval=metrics.mean_interval(scores, subjects[rows]),
        n=len(rows),
    )
    return [(found, scores)]


def _recognition(images, clip, suite, features, subjects, columns) -> list[Measured]:
    """The share of pictures in which their subject is recognised."""
    prediction = classify(clip, features, suite.subject_classes)
    seen = np.array(prediction.values)[prediction.labels]
    for column, value in zip(columns, seen, strict=True):
        column["recognised_as"] = str(value)
    rows = np.flatnonzero(np.isin(subjects, list(suite.subject_classes)))
    if not len(rows):
        return []
    right = (seen == subjects)[rows].astype(np.float64)
    found = Measurement(
        metric="subject_recognised",
        images=images,
        protocol="fairness",
        value=float(right.mean()),
        interval=metrics.wilson_interval(right.sum(), len(rows)),
        n=len(rows),
    )
    return [(found, right)]
