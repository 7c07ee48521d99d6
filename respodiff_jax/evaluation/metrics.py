"""The numbers, from labels and features: deviation ratio, CLIP score, Fréchet and kernel distance.

Pure numpy; nothing here knows where pictures or features come from.
"""

import statistics
from collections.abc import Callable, Sequence

import numpy as np

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
      ValueError: without pictures, or with fewer than two values.
    """
    counts = np.asarray(counts, np.float64)
    if counts.size < 2:
        raise ValueError(f"deviation ratio of {counts.size} attribute value(s), expected 2 or more")
    if counts.sum() <= 0:
        raise ValueError("deviation ratio of no pictures")
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

    `|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2))` (Heusel et al., 2017). The trace of the root is the
    sum of the roots of the eigenvalues of `S^(1/2) S' S^(1/2)`, which is symmetric.
    """
    (mean, cov), (mean_ref, cov_ref) = map(_moments, (features, reference))
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_ref @ root), 0)).sum()
    return float(((mean - mean_ref) ** 2).sum() + np.trace(cov) + np.trace(cov_ref) - 2 * cross)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise ValueError(f"Fréchet distance of {len(features)} picture(s), expected 2 or more")
    return features.mean(0), np.cov(features, rowvar=False)


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """KID: the unbiased squared MMD of two sets of features with the kernel `(x.y / D + 1)^3`
    (Bińkowski et al., 2018), over all pairs."""
    return float(kernel_parts(features, reference).mean())


def kernel_parts(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Each picture's part in the `kernel_distance`, `(N,)`: their mean is the distance, and they
    spread as it does (its Hájek projection, the reference being fixed)."""
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"kernel distance of {len(x)} and {len(y)} pictures, expected 2 or more")

    def kernel_sums(a, b):
        # In blocks: the whole matrix of 30,000 pictures has 7 GB.
        blocks = (a[i : i + 1024] @ b.T for i in range(0, len(a), 1024))
        return np.concatenate([((block / a.shape[1] + 1) ** 3).sum(1) for block in blocks])

    def within(a):
        with_itself = ((a * a).sum(1) / a.shape[1] + 1) ** 3
        return (kernel_sums(a, a) - with_itself) / (len(a) - 1)

    own, between = within(x), kernel_sums(x, y) / len(y)
    distance = own.mean() + within(y).mean() - 2 * between.mean()
    projected = 2 * (own - between)
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
