"""Zero-shot classification: the value whose prompts' CLIP feature is nearest to the picture's."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from respodiff_jax.backbone import Clip
from respodiff_jax.evaluation.suites import Classes


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a classifier says of N pictures.

    Attributes:
      values: the attribute's values, K of them.
      labels: int `(N,)`, indices into `values`.
      probabilities: `(N,)`, softmax probability of the label under CLIP's own temperature.
    """

    values: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray

    def counts(self, of: np.ndarray | slice = slice(None)) -> dict[str, int]:
        """Pictures by value, among those that `of` indexes."""
        found = np.bincount(self.labels[of], minlength=len(self.values))
        return dict(zip(self.values, found.tolist(), strict=True))


def classify(clip: Clip, features: np.ndarray, classes: Classes) -> Prediction:
    """Classifies pictures by their features, `(N, D)`.

    The prompts of a value are averaged as features (Radford et al., 2021, section 3.1.4).
    """
    centres = [clip.text_features(prompts).mean(0) for prompts in classes.values()]
    centres = np.stack([centre / np.linalg.norm(centre) for centre in centres])
    logits = np.exp(clip.params["logit_scale"]) * features @ centres.T
    logits -= logits.max(1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Prediction(tuple(classes), logits.argmax(1), probabilities.max(1))


def intersect(predictions: Mapping[str, Prediction]) -> Prediction:
    """Several attributes as one, whose values are combinations such as "woman x dark"."""
    (_, joint), *others = predictions.items()
    for _, other in others:
        joint = Prediction(
            tuple(f"{a} x {b}" for a in joint.values for b in other.values),
            joint.labels * len(other.values) + other.labels,
            joint.probabilities * other.probabilities,
        )
    return joint
