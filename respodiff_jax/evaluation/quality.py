"""Quality: do pictures of everyday captions still match their text, and still look like pictures?

CLIP score, and distances to reference pictures: FID and KID where Inception's weights are there,
and distances in the space of CLIP's features, which have names of their own.
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
from respodiff_jax.evaluation.pictures import Picture, check_pictures, given_pictures
from respodiff_jax.evaluation.results import Measured, Measurement


@dataclasses.dataclass(frozen=True)
class Reference:
    """Pictures that others are compared with.

    Attributes:
      pictures: of any sizes.
      identity: JSON-able, for the record.
    """

    pictures: Sequence[Picture]
    identity: Mapping[str, Any]


def open_reference(folder: str | os.PathLike) -> Reference:
    """The pictures of a folder.

    Raises:
      UserError: if it has fewer than two pictures, or some cannot be read.
    """
    pictures = given_pictures(folder)
    if len(pictures) < 2:
        raise UserError(f"reference {folder} has one picture, expected two or more")
    check_pictures(pictures, of_one_size=False)
    return Reference(pictures, {"folder": str(folder), "pictures": len(pictures)})


def open_inception() -> tuple[Inception | None, str]:
    """What computes the features of FID and KID where clean-fid and its weights are there; else
    None, and why."""
    try:
        return Inception(), ""
    except ValueError as error:
        return None, f"no FID and no KID: {error}; distances of CLIP features are on another scale"


def check_prompts(pictures: Sequence[Picture]) -> None:
    """Whether a CLIP score can be computed of pictures made elsewhere.

    Raises:
      UserError: if a picture's prompt is not known.
    """
    if lost := [picture.path for picture in pictures if not picture.prompt]:
        raise UserError(
            f"{len(lost)} pictures have no prompt, for example {lost[0]}; a CLIP score needs them:"
            " list them in metadata.csv with the columns file, prompt"
        )


def clip_scores(pictures: Sequence[Picture], clip: Clip, features: np.ndarray) -> np.ndarray:
    """Each picture's CLIP score with its own prompt, `(N,)`.

    Args:
      pictures: with prompts, of which each distinct one is embedded once.
      clip: of the text features.
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
    """Scores one set of pictures.

    Args:
      pictures: of one set, with their prompts.
      clip: of the text features.
      features: the pictures' CLIP features, `(N, D)`.
      reference: features of the reference pictures, `(M, D)`, or None.
      inception: Inception features of the pictures and of the reference ones, or None.
      paired: whether picture i and reference picture i are of the same noise.

    Returns:
      measurements with what they are means of, and columns for `per_image.csv`.
    """
    scores = clip_scores(pictures, clip, features)
    common = {"images": pictures[0].images, "protocol": "quality", "n": len(pictures)}

    def mean(metric, parts):
        interval = metrics.mean_interval(parts)
        return Measurement(metric, value=float(parts.mean()), interval=interval, **common), parts

    def distances(frechet, kernel, both):
        return [
            mean(frechet, metrics.frechet_parts(*both, paired)),
            mean(kernel, metrics.kernel_parts(*both, paired)),
        ]

    found = [mean("clip_score", scores)]
    if reference is not None:
        both = features, reference
        found += distances("clip_frechet_distance", "clip_kernel_distance", both)
    if inception is not None:
        found += distances("fid", "kid", inception)
    return found, [{"clip_score": round(float(score), 4)} for score in scores]
