"""Zero-shot classification: a picture has the value whose prompts' CLIP feature is nearest."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import scipy.special

from respodiff_jax.backbone import Clip
from respodiff_jax.evaluation.suites import Classes


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The classes of N pictures.

    Attributes:
      values: the attribute's K values.
      labels: int `(N,)`, indices into `values`.
      probabilities: `(N,)`, softmax probability of the label at CLIP's own temperature.
    """

    values: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray

    def counts(self, rows: np.ndarray | slice = slice(None)) -> dict[str, int]:
        """Number of pictures by value, among the pictures that `rows` indexes."""
        found = np.bincount(self.labels[rows], minlength=len(self.values))
        return dict(zip(self.values, found.tolist(), strict=True))


def classify(clip: Clip, features: np.ndarray, classes: Classes) -> Prediction:
    """Classifies pictures by their CLIP features, `(N, D)`.

    The features of a value's prompts are averaged (Radford et al., 2021, section 3.1.4).
    """
    texts = clip.text_features([prompt for prompts in classes.values() for prompt in prompts])
    ends = np.cumsum([len(prompts) for prompts in classes.values()])
    centres = np.stack([rows.mean(0) for rows in np.split(texts, ends[:-1])])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    logits = np.exp(clip.params["logit_scale"]) * features @ centres.T
    probabilities = scipy.special.softmax(logits, axis=1)
    return Prediction(tuple(classes), logits.argmax(1), probabilities.max(1))


def intersect(predictions: Mapping[str, Prediction]) -> Prediction:
    """Joins several attributes into one, whose values are combinations such as "woman x dark"."""
    (_, joint), *others = predictions.items()
    for _, other in others:
        joint = Prediction(
            tuple(f"{a} x {b}" for a in joint.values for b in other.values),
            joint.labels * len(other.values) + other.labels,
            joint.probabilities * other.probabilities,
        )
    return joint
