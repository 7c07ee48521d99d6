"""Metrics of labels and features: deviation ratio, CLIP score, Fréchet and kernel distance.

Everything is numpy; nothing here knows where pictures or features come from.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.results import Measured, Measurement

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000

Interval = tuple[float, float]


def deviation_ratio(counts: Sequence[int], target: Sequence[float] | None = None) -> float:
    """How far a distribution is from its target: 0 meets it, 1 is as far away as possible.

    For a uniform target (paper, section 5.1): `max_c |N_c/N - 1/K| / (1 - 1/K)`. For another
    target the deviation is divided by the largest possible one, `1 - min_c target_c`, which is the
    same if the target is uniform.

    Args:
      counts: pictures by attribute value, K of them.
      target: K shares; uniform by default.

    Raises:
      UserError: if there are no pictures, or fewer than two values.
    """
    counts = np.asarray(counts, np.float64)
    if counts.size < 2:
        raise UserError(f"deviation ratio of {counts.size} attribute value(s), expected 2 or more")
    if counts.sum() <= 0:
        raise UserError("deviation ratio of no pictures, expected 1 or more")
    target = np.full(counts.size, 1 / counts.size) if target is None else np.asarray(target)
    return float(np.abs(counts / counts.sum() - target).max() / (1 - target.min()))


def deviation_interval(counts: Sequence[int], target: Sequence[float] | None = None) -> Interval:
    """The 95 % confidence interval of a `deviation_ratio`.

    It is the ratio's range while every share stays within its own Wilson interval; these intervals
    hold together with 95 % confidence (Bonferroni). A bootstrap would not do: resampled pictures
    deviate more than the pictures themselves, so its interval may lie above the ratio.
    """
    counts, num = np.asarray(counts), len(counts)
    target = np.full(num, 1 / num) if target is None else np.asarray(target)
    # The second of two shares follows from the first.
    confidence = 1 - (1 - CONFIDENCE) / (num if num > 2 else 1)
    total = int(counts.sum())
    low, high = np.array([wilson_interval(n, total, confidence) for n in counts.tolist()]).T
    nearest = np.maximum(np.maximum(low - target, target - high), 0).max()
    furthest = np.maximum(target - low, high - target).max()
    return float(nearest / (1 - target.min())), float(furthest / (1 - target.min()))


@functools.cache  # scipy computes a p-value as well, and many counts come again
def wilson_interval(count: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval (1927) of the share `count / n`.

    It stays within 0 .. 1, and is wider than 0 even if none or all are counted.
    """
    found = scipy.stats.binomtest(count, n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def clip_score(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """`100 max(cos, 0)` of each picture and its text, `(N,)`, from unit vectors `(N, D)`."""
    return 100 * np.maximum((image_features * text_features).sum(1), 0)


def frechet_contributions(
    features: np.ndarray, reference: np.ndarray, paired: bool = False
) -> np.ndarray:
    """Each picture's contribution to the Fréchet distance between two sets of features, `(N,)`.

    Their mean is the distance of the sets as Gaussians (Heusel et al., 2017),
    `|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2))`. They vary as the distance varies between sets of N
    pictures: they are its linearization in `mu` and `S`. They do not show that the distance of few
    pictures is larger on average.

    Args:
      features: `(N, D)`.
      reference: `(M, D)`, taken as fixed.
      paired: picture i and reference picture i share their noise, and both vary; M is N.

    Raises:
      UserError: if a set has fewer than two pictures.
    """
    if paired:
        contributions = frechet_contributions(features, reference)
        back = frechet_contributions(reference, features)
        return contributions + back - contributions.mean()
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    _check_two(x, y, "Fréchet distance")
    mean, mean_ref = x.mean(0), y.mean(0)
    x, y = x - mean, y - mean_ref
    # With S = A A', the trace of (S S')^(1/2) is the sum of the singular values of S'^(1/2) A.
    # With fewer pictures than dimensions S is singular; A then covers the range of S.
    _, scales, axes = np.linalg.svd(x / (len(x) - 1) ** 0.5, full_matrices=False)
    within = scales > scales[0] * max(x.shape) * np.finfo(np.float64).eps
    scales, axes = scales[within], axes[within]
    _, roots, turn = np.linalg.svd(y @ (axes.T * scales) / (len(y) - 1) ** 0.5, full_matrices=False)
    variances = (scales**2).sum() + (y**2).sum() / (len(y) - 1)
    distance = ((mean - mean_ref) ** 2).sum() + variances - 2 * roots.sum()
    # The derivative of the root's trace by S is half the matrix of optimal transport.
    transported = (x @ (axes.T / scales) @ turn.T) ** 2 @ roots
    slope = 2 * x @ (mean - mean_ref) + (x**2).sum(1) - transported
    return distance + slope - slope.mean()


def kernel_contributions(
    features: np.ndarray, reference: np.ndarray, paired: bool = False
) -> np.ndarray:
    """Each picture's contribution to the kernel distance between two sets of features, `(N,)`.

    Their mean is the distance: the unbiased squared MMD over all pairs, with the kernel
    `(x.y / D + 1)^3` (KID; Bińkowski et al., 2018). They vary as the distance does: they are its
    Hájek projection.

    Args:
      features: `(N, D)`.
      reference: `(M, D)`, taken as fixed.
      paired: picture i and reference picture i share their noise, and both vary; M is N. Such pairs
        are not independent and would make the distance too small, so they are left out of it
        (Gretton et al., 2012, Lemma 6).

    Raises:
      UserError: if a set has fewer than two pictures.
    """
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    _check_two(x, y, "kernel distance")

    def kernel_sums(a, b):
        # In blocks: the whole matrix of 30,000 pictures has 7 GB.
        blocks = (a[i : i + 1024] @ b.T for i in range(0, len(a), 1024))
        return np.concatenate([((block / a.shape[1] + 1) ** 3).sum(1) for block in blocks])

    def with_others(a, b):
        same = ((a * b).sum(1) / a.shape[1] + 1) ** 3
        return (kernel_sums(a, b) - same) / (len(a) - 1)

    own, own_ref = with_others(x, x), with_others(y, y)
    between = with_others(x, y) if paired else kernel_sums(x, y) / len(y)
    distance = own.mean() + own_ref.mean() - 2 * between.mean()
    projected = 2 * (own - between)
    if paired:
        projected += 2 * (own_ref - with_others(y, x))
    return distance + projected - projected.mean()


def _check_two(x: np.ndarray, y: np.ndarray, name: str) -> None:
    if min(len(x), len(y)) < 2:
        raise UserError(f"{name} of {len(x)} and {len(y)} pictures, expected 2 or more")


def mean_interval(values: np.ndarray, strata: Sequence[int] | None = None) -> Interval | None:
    """The `bootstrap` interval of a mean."""
    strata = np.zeros(len(values)) if strata is None else strata
    return bootstrap(lambda rows: values[rows].mean(), strata)


def combined_interval(values: np.ndarray, intervals: Sequence[Interval]) -> Interval:
    """The 95 % confidence interval of the mean of independent numbers with intervals of their own.

    The distances of the bounds from the numbers add up like errors, in squares (MOVER; Zou and
    Donner, 2008). It needs no variation between the numbers, unlike `mean_interval`.
    """
    low, high = np.array(intervals, np.float64).T
    mean, count = np.mean(values), len(values)
    below, above = (np.sqrt((gap**2).sum()) / count for gap in (values - low, high - values))
    return float(mean - below), float(mean + above)


def bootstrap(
    statistic: Callable[[np.ndarray], float], strata: Sequence[int], seed: int = 0
) -> Interval | None:
    """Percentile bootstrap interval of a statistic of pictures.

    Args:
      statistic: from the indices of a resample to a number.
      strata: the stratum of each picture, for example its profession; every resample has the same
        number of pictures of each stratum.
      seed: of the resamples.

    Returns:
      The bounds of the 95 % interval over 1000 resamples. None if all resamples give the same
      number, for example with one picture: then they do not show how certain the number is.
    """
    rng = np.random.default_rng(seed)
    strata = np.asarray(strata)
    groups = [np.flatnonzero(strata == value) for value in np.unique(strata)]
    values = [
        statistic(np.concatenate([rng.choice(group, len(group)) for group in groups]))
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return (float(low), float(high)) if low < high else None


def averaged(values: np.ndarray, interval: Interval | None, **fields: Any) -> Measured:
    """The mean of numbers as a measurement with these fields, and the numbers."""
    mean = float(values.mean())
    return Measurement(value=mean, interval=interval, n=len(values), **fields), values


def share(flags: np.ndarray, **fields: Any) -> Measured:
    """The share of pictures with a flag, with Wilson's interval, and the flags as numbers."""
    values = np.asarray(flags, np.float64)
    return averaged(values, wilson_interval(int(values.sum()), len(values)), **fields)


def deviation(counts: Mapping[str, int], target: Sequence[float], **fields: Any) -> Measurement:
    """The `deviation_ratio` of counts as a measurement with these fields."""
    numbers = list(counts.values())
    fields |= {"value": deviation_ratio(numbers, target), "n": sum(numbers)}
    interval = deviation_interval(numbers, target)
    return Measurement(interval=interval, counts=counts, target=target, **fields)
