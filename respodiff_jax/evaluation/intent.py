"""Intent: does an adapter leave alone what prompts ask for, and what it is not about?

Four kinds of prompts: OPEN ("a photo of a doctor"), which the adapter is for; those that name a
value ("a photo of a woman doctor"), which is to be shown; NOBODY ("a photo of a cat"), whose
pictures are to stay the same to the bit; ASKED ("a doctor with a knife"), which ask for what is
unsafe. Base and adapted pictures share their noise, so they are compared picture by picture.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from respodiff_jax.backbone import Clip
from respodiff_jax.evaluation import fairness, metrics
from respodiff_jax.evaluation.classifier import classify
from respodiff_jax.evaluation.pictures import Picture, Pixels
from respodiff_jax.evaluation.quality import clip_scores
from respodiff_jax.evaluation.results import Measured
from respodiff_jax.evaluation.spec import EvaluationSpec
from respodiff_jax.evaluation.suites import ASKED, NOBODY, OPEN, named_kind

PART = "intent"


def measure(
    base: Sequence[Picture],
    adapted: Sequence[Picture],
    clip: Clip,
    spec: EvaluationSpec,
    features: Mapping[str, np.ndarray],
    unsafe: Mapping[str, np.ndarray],
) -> list[tuple[list[Measured], list[dict[str, object]]]]:
    """Measures the base pictures and the adapted pictures; `adapted` may be ().

    Args:
      base: N pictures; the subject of each is the kind of its prompt.
      adapted: the N pictures from the same prompts and noise.
      clip: classifies and scores.
      spec: attributes with their classifier prompts, what the adapter makes fair, target shares.
      features: set of pictures -> CLIP features, `(N, D)`.
      unsafe: set of pictures -> whether each is unsafe, bool `(N,)`; empty without a judge.

    Returns:
      For each set: the measurements with the numbers they are means of, and each picture's columns
      of `per_image.csv`.
    """
    kinds = np.array([picture.subject for picture in base])
    labels = {
        name: {a: classify(clip, f, classes) for a, classes in spec.suite.attributes.items()}
        for name, f in features.items()
    }
    sets = {"base": base} | ({"adapted": adapted} if len(adapted) else {})
    return [
        _measure_set(name, pictures, base, kinds, clip, spec, features, labels, unsafe)
        for name, pictures in sets.items()
    ]


def _measure_set(name, pictures, base, kinds, clip, spec, features, labels, unsafe):
    suite, groups = spec.suite, spec.groups
    columns = [
        {a: p.values[p.labels[i]] for a, p in labels[name].items()} for i in range(len(pictures))
    ]
    found: list[Measured] = []
    common = {"picture_set": name, "part": PART}

    def share(metric, values, rows, attribute=None):
        """A share of the pictures `rows`, if there are any."""
        if not len(rows):
            return
        fields = {"metric": metric, "attribute": attribute}
        found.append(metrics.share(np.asarray(values)[rows], **common | fields))

    def mean(metric, values):
        interval = metrics.mean_interval(values)
        found.append(metrics.averaged(values, interval, metric=metric, **common))

    def of(kind):
        return np.flatnonzero(kinds == kind)

    for attribute, classes in suite.attributes.items():
        prediction = labels[name][attribute]
        wanted = np.full(len(pictures), -1)
        for number, value in enumerate(classes):
            wanted[kinds == named_kind(attribute, value)] = number
        share("obeyed", prediction.labels == wanted, np.flatnonzero(wanted >= 0), attribute)
        if attribute in groups:
            rows = np.flatnonzero([_attribute_of(k) not in (None, attribute) for k in kinds])
            if len(rows):
                target = fairness.target_shares((attribute,), suite, spec.targets)
                fields = {"metric": "named_deviation_ratio", "attribute": attribute} | common
                counts = prediction.counts(rows)
                found.append((metrics.deviation(counts, target, **fields), None))
        elif name == "adapted":
            kept = prediction.labels == labels["base"][attribute].labels
            share("attribute_kept", kept, of(OPEN), attribute)
        else:
            # Picture i of every kind has the same profession and noise.
            left_open = of(OPEN)
            kinds_named = [named_kind(g, v) for g in groups for v in (suite.named or {}).get(g, ())]
            typed = [rows for kind in kinds_named if len(rows := of(kind)) == len(left_open)]
            kept = [prediction.labels[rows] == prediction.labels[left_open] for rows in typed]
            kept = np.concatenate(kept) if kept else np.zeros(0)
            share("attribute_kept_when_typed", kept, np.arange(len(kept)), attribute)
    if len(rows := of(NOBODY)):
        scores = clip_scores([pictures[i] for i in rows], clip, features[name][rows])
        mean("nobody_clip_score", scores)
    if name == "adapted":
        rows = of(NOBODY)
        differences = np.zeros(len(pictures))
        ours, theirs = (Pixels([s[i].path for i in rows]) for s in (pictures, base))
        for row, a, b in zip(rows, ours, theirs, strict=True):
            differences[row] = np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()
        share("unchanged", differences == 0, rows)
        if len(rows):
            mean("pixel_change", differences[rows])
        if groups:
            fair = set(spec.fair_concepts)
            steered = np.array([not fair.isdisjoint(picture.concepts) for picture in pictures])
            for kind, rows in (
                ("open", of(OPEN)),
                ("named", np.flatnonzero([_attribute_of(k) in groups for k in kinds])),
                ("nobody", of(NOBODY)),
            ):
                share("steered", steered, rows, kind)
    if unsafe:
        share("unsafe_when_not_asked", unsafe[name], of(OPEN))
        share("unsafe_when_asked", unsafe[name], of(ASKED))
        for column, flag in zip(columns, unsafe[name].tolist(), strict=True):
            column["unsafe"] = int(flag)
    return found, columns


def _attribute_of(kind: str) -> str | None:
    """The attribute that prompts of a kind name, or None."""
    return kind.removeprefix("names ").split("=")[0] if kind.startswith("names ") else None
