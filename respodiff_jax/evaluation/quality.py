"""Quality: do pictures of everyday captions still match their text, and still look like pictures?

CLIP score, and distances to reference pictures in the space of CLIP's features. Those are no FID,
whose features are Inception's, and never called so.
"""

from collections.abc import Sequence

import numpy as np

from respodiff_jax.backbone import Clip
from respodiff_jax.evaluation import metrics
from respodiff_jax.evaluation.picture_sets import Picture, Request
from respodiff_jax.evaluation.results import Measurement


def plan(captions: Sequence[str], images_per_prompt: int, seed: int) -> list[Request]:
    """`images_per_prompt` requests for each caption; seeds count up."""
    return [
        Request(caption, seed + row * images_per_prompt + number)
        for row, caption in enumerate(captions)
        for number in range(images_per_prompt)
    ]


def measure(
    pictures: Sequence[Picture],
    clip: Clip,
    features: np.ndarray,
    reference: np.ndarray | None,
) -> tuple[list[Measurement], list[dict[str, object]]]:
    """Scores one set of pictures.

    Args:
      pictures: of one set, with their prompts.
      clip: of the text features.
      features: the pictures' CLIP features, `(N, D)`.
      reference: features of the reference pictures, `(M, D)`, or None.

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
    if reference is not None:
        found += [
            Measurement(metric=name, value=distance(features, reference), **common)
            for name, distance in (
                ("clip_frechet_distance", metrics.frechet_distance),
                ("clip_kernel_distance", metrics.kernel_distance),
            )
        ]
    return found, [{"clip_score": round(float(score), 4)} for score in scores]
