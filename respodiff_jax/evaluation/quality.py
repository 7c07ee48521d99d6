"""Quality: do pictures of everyday captions still match their text and look like pictures?

The part measures a CLIP score and distances to reference pictures: FID and KID if Inception's
weights are available, and distances of CLIP features, which have names of their own.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from respodiff_jax.backbone import Clip
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import metrics
from respodiff_jax.evaluation.inception import Inception
from respodiff_jax.evaluation.pictures import Picture, check_pictures, find_pictures
from respodiff_jax.evaluation.results import Measured


@dataclasses.dataclass(frozen=True)
class Reference:
    """Pictures to compare with.

    Attributes:
      pictures: the pictures, of any sizes.
      identity: what they are, JSON-able.
    """

    pictures: Sequence[Picture]
    identity: Mapping[str, Any]


def open_reference(folder: str | os.PathLike) -> Reference:
    """The reference pictures of a folder.

    Raises:
      UserError: if there are fewer than two pictures, or some cannot be read.
    """
    pictures = find_pictures(folder)
    if len(pictures) < 2:
        raise UserError(f"`reference` {folder} has one picture, expected two or more")
    check_pictures(pictures, of_one_size=False)
    return Reference(pictures, {"folder": str(folder), "pictures": len(pictures)})


def open_inception() -> tuple[Inception | None, str]:
    """Opens what FID and KID need: the extractor and "", or None and why it is not available."""
    try:
        return Inception(), ""
    except UserError as error:
        return None, f"no FID and no KID: {error}; distances of CLIP features are on another scale"


def clip_scores(pictures: Sequence[Picture], clip: Clip, features: np.ndarray) -> np.ndarray:
    """Each picture's CLIP score with its own prompt, `(N,)`.

    Args:
      pictures: N pictures that have prompts.
      clip: the CLIP of the features.
      features: the pictures' CLIP features, `(N, D)`.
    """
    prompts = list(dict.fromkeys(picture.prompt for picture in pictures))
    texts = dict(zip(prompts, clip.text_features(prompts), strict=True))
    return metrics.clip_score(features, np.stack([texts[p.prompt] for p in pictures]))


def measure(
    pictures: Sequence[Picture],
    clip: Clip,
    features: np.ndarray,
    reference: np.ndarray | None,
    inception: tuple[np.ndarray, np.ndarray] | None = None,
    paired: bool = False,
) -> tuple[list[Measured], list[dict[str, object]]]:
    """Measures the quality of one set of pictures.

    Args:
      pictures: N pictures of one set that have prompts.
      clip: the CLIP of the features.
      features: the pictures' CLIP features, `(N, D)`.
      reference: CLIP features of the reference pictures, `(M, D)`, or None.
      inception: Inception features of the pictures and of the reference pictures, or None.
      paired: whether picture i and reference picture i share their noise.

    Returns:
      The measurements with the numbers they are means of, and each picture's columns of
      `per_image.csv`.
    """
    scores = clip_scores(pictures, clip, features)
    common = {"picture_set": pictures[0].picture_set, "part": "quality"}

    def mean(metric, values):
        return metrics.averaged(values, metrics.mean_interval(values), metric=metric, **common)

    def distances(frechet, kernel, both):
        return [
            mean(frechet, metrics.frechet_contributions(*both, paired)),
            mean(kernel, metrics.kernel_contributions(*both, paired)),
        ]

    found = [mean("clip_score", scores)]
    if reference is not None:
        both = features, reference
        found += distances("clip_frechet_distance", "clip_kernel_distance", both)
    if inception is not None:
        found += distances("fid", "kid", inception)
    return found, [{"clip_score": round(float(score), 4)} for score in scores]
