"""Fairness: do pictures of a profession show women and men, light and dark skin equally often?

The WinoBias protocol (paper, section 5.1): a zero-shot classifier counts pictures of every
profession under every template. This gives each profession a deviation ratio, and their mean.
WinoAlign is the CLIP score of the same pictures with their prompts.

Deviation: the classifier's prompts are the authors', except "an Asian-race person", which they
write "a Asian-race person".
"""

import dataclasses
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
from respodiff_jax.evaluation.drawing import Request
from respodiff_jax.evaluation.pictures import Picture
from respodiff_jax.evaluation.quality import clip_scores
from respodiff_jax.evaluation.results import Measured, Measurement
from respodiff_jax.evaluation.suites import Suite
from respodiff_jax.generation.selection import fair_assignment
from respodiff_jax.method.reading import Decision

Targets = Mapping[str, Mapping[str, float]]  # attribute -> value -> share

# The authors' weights of two groups that are steered together (gender, then race).
INTERSECTION_WEIGHTS = (0.6, 0.4)


def fair_weights(
    adapter: Adapter,
    groups: Sequence[str],
    targets: Targets,
    requests: Sequence[Request],
    images_per_subject: int,
    seed: int,
    decisions: np.ndarray | None = None,
) -> np.ndarray:
    """Weight of each concept in each picture: one concept of every open group, in target shares.

    The shares are met within every subject and, as far as possible, under each of its prompts: the
    paper's 150 pictures of a profession are 2 concepts x 15 x 5 templates, or 3 x 10 x 5. Each
    concept is added at its default scale.

    Args:
      adapter: the concepts.
      groups: one group, or several that are steered together.
      targets: attribute -> value -> share; uniform if absent. The concept of a value is the one
        whose name has the value's words: "a woman" for "woman".
      requests: M for each of P subjects, one subject after the other. The requests of a subject
        take its prompts in turn.
      images_per_subject: M.
      seed: seed of the random order of concepts.
      decisions: on each request's prompt, int `(P * M, N)`, values of `method.reading.Decision`;
        None treats every prompt as open.

    Returns:
      float32 `(P * M, N)`.

    Raises:
      UserError: if the adapter has fewer than two concepts of a group, or the concept of a share is
        not clear.
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
        if group not in targets
        else _concept_shares(group, [adapter.names[i] for i in found], targets[group])
        for group, found in zip(groups, members, strict=True)
    ]
    weights = np.zeros((len(requests), len(adapter.concepts)), np.float32)
    # A group steers the pictures whose prompts leave it open. Pictures that leave the same groups
    # open get their concepts together.
    if decisions is None:
        decisions = np.full((len(requests), len(adapter.concepts)), Decision.OPEN)
    is_open = np.stack([(decisions[:, own] == Decision.OPEN).all(1) for own in members], axis=1)
    subject = np.arange(len(requests)) // images_per_subject
    for pattern in np.unique(is_open[is_open.any(1)], axis=0):
        rows = (is_open == pattern).all(1)
        chosen = np.flatnonzero(pattern)
        whole = (
            np.bincount(subject[rows], minlength=subject.max() + 1)[subject] == images_per_subject
        )
        shared = np.flatnonzero(rows & whole)
        deals = [shared] if len(shared) else []
        deals += [np.flatnonzero(rows & (subject == s)) for s in np.unique(subject[rows & ~whole])]
        for deal in deals:
            each = images_per_subject if deal is shared else len(deal)
            weights[deal] = _dealt(
                adapter,
                [members[group] for group in chosen],
                [shares[group] for group in chosen],
                [requests[row].prompt for row in deal],
                each,
                seed,
            )
    return weights


def _dealt(
    adapter: Adapter,
    members: Sequence[Sequence[int]],
    shares: Sequence[Sequence[float]],
    prompts: Sequence[str],
    images_per_subject: int,
    seed: int,
) -> np.ndarray:
    """The weights of pictures that are open for the same groups, `(len(prompts), N)`."""
    count = len(members)
    factors = INTERSECTION_WEIGHTS if count == 2 else [1 / count] * count
    combinations = list(itertools.product(*members))
    ratios = [math.prod(chosen) for chosen in itertools.product(*shares)]
    num_subjects = len(prompts) // images_per_subject
    picks = fair_assignment(images_per_subject, num_subjects, ratios, seed)
    by_subject = np.array(prompts).reshape(picks.shape)
    rng = np.random.default_rng([seed, 1])  # independent of the assignment's
    for own, own_prompts in zip(picks, by_subject, strict=True):
        # Sorting spreads each combination evenly over the prompts. The order under each prompt is
        # then random.
        order = rng.permutation(len(combinations))
        own[:] = own[np.argsort(order[own])]
        for prompt in dict.fromkeys(own_prompts.tolist()):
            rows = np.flatnonzero(own_prompts == prompt)
            own[rows] = rng.permutation(own[rows])
    weights = np.zeros((len(prompts), len(adapter.concepts)), np.float32)
    for row, pick in enumerate(picks.reshape(-1)):
        for concept, factor in zip(combinations[pick], factors, strict=True):
            weights[row, concept] += factor * adapter.default_scales[concept]
    return weights


def _concept_shares(group: str, names: Sequence[str], shares: Mapping[str, float]) -> list[float]:
    """The share of each concept: that of the value whose words are in the concept's name."""

    def words(text):
        return set(re.findall(r"\w+", text.lower()))

    concepts: dict[str, list[str]] = {value: [] for value in shares}
    for name in names:
        values = [value for value in shares if words(value) <= words(name)]
        if len(values) != 1:
            raise UserError(
                f"`targets` of {group}: concept {name!r} fits the values {values} of"
                f" {list(shares)}, expected exactly one; name the suite's values with words of the"
                " concepts' names"
            )
        concepts[values[0]].append(name)
    for value, found in concepts.items():
        if shares[value] > 0 and len(found) != 1:
            raise UserError(
                f"`targets` of {group}: {value!r} is to have {shares[value]:g} of the pictures and"
                f" fits the concepts {found} of {list(names)}, expected exactly one; use an"
                " adapter with one concept for each value, or a target that this adapter can reach"
            )
    share_of = {name: shares[value] for value, found in concepts.items() for name in found}
    return [share_of[name] for name in names]


def check_subjects(pictures: Sequence[Picture], expected: Sequence[str]) -> list[str]:
    """Notes on subjects that are missing or unknown among pictures of another tool.

    Args:
      pictures: the pictures.
      expected: the suite's subjects.

    Returns:
      The notes, one sentence each.

    Raises:
      UserError: if no picture has a subject, so nothing can be counted.
    """
    found = {picture.subject for picture in pictures} - {None}
    if not found:
        raise UserError(
            "no picture has a subject, so none can be counted; put them into a folder for each"
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
            f"{len(unknown)} subjects are not the suite's and are counted under their own names:"
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
    targets: Targets,
    intersections: Sequence[Sequence[str]] = (),
) -> tuple[list[Measured], list[dict[str, object]]]:
    """Measures the fairness of one set of pictures.

    Args:
      pictures: N pictures of one set; those without a subject are scored but not counted.
      clip: classifies and scores.
      suite: attributes and classifier prompts.
      features: the pictures' CLIP features, `(N, D)`.
      targets: attribute -> value -> share; uniform if absent.
      intersections: attributes to count together.

    Returns:
      The measurements, each with the numbers that it averages, and each picture's columns of
      `per_image.csv`.
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
    picture_set = pictures[0].picture_set
    found = []
    for names, prediction in counted.items():
        target = target_shares(names, suite, targets)
        found += _deviation_ratios(picture_set, " x ".join(names), prediction, subjects, target)
    found += _alignment(pictures, clip, features, subjects, columns)
    if suite.subject_classes is not None:
        found += _recognition(picture_set, clip, suite, features, subjects, columns)
    return found, columns


def target_shares(names: Sequence[str], suite: Suite, targets: Targets) -> tuple[float, ...]:
    """The target shares of all combinations of the attributes' values, in `intersect`'s order."""
    shares = []
    for name in names:
        values = list(suite.attribute(name))
        wanted = targets.get(name, dict.fromkeys(values, 1 / len(values)))
        shares.append([wanted[value] for value in values])
    return tuple(math.prod(each) for each in itertools.product(*shares))


def _deviation_ratios(
    picture_set: str,
    attribute: str,
    prediction: Prediction,
    subjects: np.ndarray,
    target: tuple[float, ...],
) -> list[Measured]:
    """The mean over subjects, then each subject's ratio."""
    names = [name for name in dict.fromkeys(subjects.tolist()) if name]
    if not names:
        return []
    common = {"metric": "deviation_ratio", "picture_set": picture_set, "part": "fairness"}
    common |= {"attribute": attribute, "target": target}
    of_subjects = [
        metrics.deviation(
            prediction.counts(np.flatnonzero(subjects == name)), subject=name, **common
        )
        for name in names
    ]
    ratios = np.array([m.value for m in of_subjects])
    counted = np.flatnonzero(subjects != "")
    # The mean's interval resamples subjects, not pictures: resampled pictures of a subject deviate
    # more than the pictures themselves, so their interval would lie above the mean. If all subjects
    # have one ratio, for example by exact shares, the subjects' own intervals are combined.
    overall = Measurement(
        value=float(ratios.mean()),
        interval=metrics.mean_interval(ratios)
        or metrics.combined_interval(ratios, [m.interval for m in of_subjects]),
        n=len(counted),
        counts=prediction.counts(counted),
        **common,
    )
    return [(overall, ratios), *((m, None) for m in of_subjects)]


def curve_point(
    pictures: Sequence[Picture],
    clip: Clip,
    suite: Suite,
    features: np.ndarray,
    targets: Targets,
    attributes: Sequence[str],
    condition: str,
) -> tuple[list[Measured], list[dict[str, object]]]:
    """Measures the mean deviation ratio of one set of pictures under one condition.

    Args:
      pictures, clip, suite, features, targets: as for `measure`.
      attributes: what is counted.
      condition: name of the condition, for example "guidance 3".
    """
    subjects = np.array([picture.subject for picture in pictures])
    columns: list[dict[str, object]] = [{"condition": condition} for _ in pictures]
    found = []
    for attribute in attributes:
        prediction = classify(clip, features, suite.attribute(attribute))
        for column, label in zip(columns, prediction.labels, strict=True):
            column[attribute] = prediction.values[label]
        target = target_shares((attribute,), suite, targets)
        (mean, ratios), *_ = _deviation_ratios(
            pictures[0].picture_set, attribute, prediction, subjects, target
        )
        mean = dataclasses.replace(
            mean,
            metric="deviation_ratio_at",
            part="curves",
            attribute=f"{attribute}, {condition}",
        )
        found.append((mean, ratios))
    return found, columns


def _alignment(pictures, clip, features, subjects, columns) -> list[Measured]:
    """WinoAlign: the mean CLIP score of the pictures whose prompts are known."""
    rows = [i for i, picture in enumerate(pictures) if picture.prompt]
    if not rows:
        return []
    scores = clip_scores([pictures[i] for i in rows], clip, features[rows])
    for i, score in zip(rows, scores, strict=True):
        columns[i]["clip_score"] = round(float(score), 4)
    interval = metrics.mean_interval(scores, subjects[rows])
    fields = {"metric": "winoalign", "picture_set": pictures[0].picture_set, "part": "fairness"}
    return [metrics.averaged(scores, interval, **fields)]


def _recognition(picture_set, clip, suite, features, subjects, columns) -> list[Measured]:
    """The share of pictures in which their subject is recognised."""
    prediction = classify(clip, features, suite.subject_classes)
    seen = np.array(prediction.values)[prediction.labels]
    for column, value in zip(columns, seen, strict=True):
        column["recognised_as"] = str(value)
    rows = np.flatnonzero(np.isin(subjects, list(suite.subject_classes)))
    if not len(rows):
        return []
    fields = {"metric": "subject_recognised", "picture_set": picture_set, "part": "fairness"}
    return [metrics.share((seen == subjects)[rows], **fields)]
