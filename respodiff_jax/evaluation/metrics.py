"""The numbers, from labels and features: deviation ratio, CLIP score, Fréchet and kernel distance.

Pure numpy; nothing here knows where pictures or features come from.
"""

import statistics
from collections.abc import Callable, Sequence

import numpy as np

from respodiff_jax.errors import UserError

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000

Interval = tuple[float, float]


def deviation_ratio(counts: Sequence[int], target: Sequence[float] | None = None) -> float:
    """How far a distribution is from its target: 0 meets it, 1 is as far off as can be.

    Uniform target (paper, section 5.1): `max_c |N_c/N - 1/K| / (1 - 1/K)`. For any other, the
    deviation is divided by the greatest possible, `1 - min_c target_c`, which for a uniform target
    is the same.

    Args:
      counts: pictures by attribute value, K of them.
      target: K shares; uniform by default.

    Raises:
      UserError: without pictures, or with fewer than two values.
    """
    counts = np.asarray(counts, np.float64)
    if counts.size < 2:
        raise UserError(f"deviation ratio of {counts.size} attribute value(s), expected 2 or more")
    if counts.sum() <= 0:
        raise UserError("deviation ratio of no pictures")
    target = np.full(counts.size, 1 / counts.size) if target is None else np.asarray(target)
    return float(np.abs(counts / counts.sum() - target).max() / (1 - target.min()))


def deviation_interval(counts: Sequence[int], target: Sequence[float] | None = None) -> Interval:
    """The interval of a `deviation_ratio`: its range while every share stays in its own interval.

    The shares' intervals are Wilson's and hold together with 95 % confidence (Bonferroni).
    Resampled pictures deviate more than the pictures themselves, so that a bootstrap's interval
    may lie above the ratio.
    """
    counts, num = np.asarray(counts), len(counts)
    target = np.full(num, 1 / num) if target is None else np.asarray(target)
    # Of two shares one follows from the other.
    confidence = 1 - (1 - CONFIDENCE) / (num if num > 2 else 1)
    shares = [wilson_interval(count, counts.sum(), confidence) for count in counts.tolist()]
    low, high = np.array(shares).T
    nearest = np.maximum(np.maximum(low - target, target - high), 0).max()
    furthest = np.maximum(target - low, high - target).max()
    return float(nearest / (1 - target.min())), float(furthest / (1 - target.min()))


def wilson_interval(count: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a share, `count` of `n` (Wilson, 1927): within 0 .. 1, and of some
    width where all or none are counted."""
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share = count / n
    centre = share + z**2 / (2 * n)
    half = z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
    low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    return min(max(low, 0.0), share), max(min(high, 1.0), share)


def clip_score(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """`100 max(cos, 0)` of each picture and its text, `(N,)`, from unit vectors `(N, D)`."""
    return 100 * np.maximum((image_features * text_features).sum(1), 0)


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Fréchet distance of two sets of features, `(N, D)` and `(M, D)`, taken as Gaussians.

    `|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2))` (Heusel et al., 2017).
    """
    return float(frechet_parts(features, reference).mean())


def frechet_parts(features: np.ndarray, reference: np.ndarray, paired: bool = False) -> np.ndarray:
    """Each picture's part in the `frechet_distance`, `(N,)`: their mean is the distance, and they
    spread as it does between sets of N pictures (its linearization in `mu` and `S`). That few
    pictures are further away than many is not in this spread.

    Args:
      features: `(N, D)`.
      reference: `(M, D)`, which is fixed.
      paired: the reference is not fixed: its pictures, N, are of the same noise as these.
    """
    if paired:
        parts = frechet_parts(features, reference)
        return parts + frechet_parts(reference, features) - parts.mean()
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    if min(len(x), len(y)) < 2:
        raise UserError(f"Fréchet distance of {len(x)} and {len(y)} pictures, expected 2 or more")
    mean, mean_ref = x.mean(0), y.mean(0)
    x, y = x - mean, y - mean_ref
    # With S = A A', the trace of (S S')^(1/2) is the sum of the singular values of S'^(1/2) A. Of
    # fewer pictures than dimensions, S is singular, and A is over its range.
    _, scales, axes = np.linalg.svd(x / (len(x) - 1) ** 0.5, full_matrices=False)
    within = scales > scales[0] * max(x.shape) * np.finfo(np.float64).eps
    scales, axes = scales[within], axes[within]
    _, roots, turn = np.linalg.svd(y @ (axes.T * scales) / (len(y) - 1) ** 0.5, full_matrices=False)
    variances = (scales**2).sum() + (y**2).sum() / (len(y) - 1)
    distance = ((mean - mean_ref) ** 2).sum() + variances - 2 * roots.sum()
    # The derivative of the trace of the root by S is half the matrix of optimal transport.
    transported = (x @ (axes.T / scales) @ turn.T) ** 2 @ roots
    slope = 2 * x @ (mean - mean_ref) + (x**2).sum(1) - transported
    return distance + slope - slope.mean()


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """KID: the unbiased squared MMD of two sets of features with the kernel `(x.y / D + 1)^3`
    (Bińkowski et al., 2018), over all pairs."""
    return float(kernel_parts(features, reference).mean())


def kernel_parts(features: np.ndarray, reference: np.ndarray, paired: bool = False) -> np.ndarray:
    """Each picture's part in the `kernel_distance`, `(N,)`: their mean is the distance, and they
    spread as it does (its Hájek projection).

    Args:
      features: `(N, D)`.
      reference: `(M, D)`, which is fixed.
      paired: the reference is not fixed: its pictures, N, are of the same noise as these. Two of
        the same noise are not independent and left out of the distance (Gretton et al., 2012,
        Lemma 6), which is otherwise too small.
    """
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    if min(len(x), len(y)) < 2:
        raise UserError(f"kernel distance of {len(x)} and {len(y)} pictures, expected 2 or more")

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


def mean_interval(parts: np.ndarray, strata: Sequence[int] | None = None) -> Interval | None:
    """The `bootstrap` interval of a mean."""
    strata = np.zeros(len(parts)) if strata is None else strata
    return bootstrap(lambda rows: parts[rows].mean(), strata)


def bootstrap(
    statistic: Callable[[np.ndarray], float], strata: Sequence[int], seed: int = 0
) -> Interval | None:
    """Percentile bootstrap interval of a statistic of pictures.

    Args:
      statistic: from the indices of a resample to a number.
      strata: for each picture what it belongs to (its profession, say): resamples keep the number
        of pictures of each.
      seed: of the resamples.

    Returns:
      The bounds of the 95 % interval, over 1000 resamples; None where all resamples are alike, as
      of one picture: they do not tell how sure the number is.
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
