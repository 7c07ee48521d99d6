"""Quality: do pictures of everyday captions still match their text, and still look like pictures?

CLIP score, and distances to reference pictures in the space of CLIP's features. Those are no FID
and KID, whose features are Inception's, and never called so.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from respodiff_jax.backbone import Clip
from respodiff_jax.evaluation import metrics
from respodiff_jax.evaluation.inception import Inception
from respodiff_jax.evaluation.picture_sets import Picture, given_pictures
from respodiff_jax.evaluation.results import Measurement


@dataclasses.dataclass(frozen=True)
class Reference:
    """Pictures that others are compared with.

    Attributes:
      pictures: of any sizes.
      inception: what computes the features of FID and KID, or None.
      note: why there is none, or "".
      identity: JSON-able, for the record.
    """

    pictures: Sequence[Picture]
    inception: Inception | None
    note: str
    identity: Mapping[str, Any]


def open_reference(folder: str | os.PathLike) -> Reference:
    """The pictures of a folder; with FID and KID where clean-fid and its weights are there.

    Raises:
      ValueError: if it has fewer than two pictures.
    """
    pictures = given_pictures(folder)
    if len(pictures) < 2:
        raise ValueError(f"reference {folder} has one picture, expected two or more")
    try:
        inception, note = Inception(), ""
    except ValueError as error:
        inception = None
        note = f"no FID and no KID: {error}; distances of CLIP features are on another scale"
    identity = {
        "folder": str(folder),
        "pictures": len(pictures),
        "inception": inception and dict(inception.identity),
    }
    return Reference(pictures, inception, note, identity)


def measure(
    pictures: Sequence[Picture],
    clip: Clip,
    features: np.ndarray,
    reference: np.ndarray | None,
    inception: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[list[Measurement], list[dict[str, object]]]:
    """Scores one set of pictures.

    Args:
      pictures: of one set, with their prompts.
      clip: of the text features.
      features: the pictures' CLIP features, `(N, D)`.
      reference: features of the reference pictures, `(M, D)`, or None.
      inception: Inception features of the pictures and of the reference ones, or None.

    Returns:
      measurements, and columns for `per_image.csv`.

    Raises:
      ValueError: if a picture's prompt is not known.
    """
    if lost := [picture.path for picture in pictures if not picture.prompt]:
        raise ValueError(
            f"{len(lost)} pictures have no prompt, for example {lost[0]}; a CLIP score needs them:"
            " list them in metadata.csv with the columns file, prompt"
        )
    prompts = list(dict.fromkeys(picture.prompt for picture in pictures))
    texts = dict(zip(prompts, clip.text_features(prompts), strict=True))
    scores = metrics.clip_score(features, np.stack([texts[p.prompt] for p in pictures]))
    common = {"images": pictures[0].images, "protocol": "quality", "n": len(pictures)}
    everywhere = np.zeros(len(pictures))
    found = [
        Measurement(
            metric="clip_score",
            value=float(scores.mean()),
            interval=metrics.bootstrap(lambda i: scores[i].mean(), everywhere),
            **common,
        )
    ]
    distances = []
    if reference is not None:
        distances += [
            ("clip_frechet_distance", metrics.frechet_distance(features, reference)),
            ("clip_kernel_distance", metrics.kernel_distance(features, reference)),
        ]
    if inception is not None:
        distances += [
            ("fid", metrics.frechet_distance(*inception)),
            ("kid", metrics.kernel_distance(*inception)),
        ]
    found += [Measurement(metric=name, value=value, **common) for name, value in distances]
    return found, [{"clip_score": round(float(score), 4)} for score in scores]
