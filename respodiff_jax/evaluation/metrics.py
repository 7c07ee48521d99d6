"""The numbers, from labels and features: deviation ratio, CLIP score, Fréchet and kernel distance.

Pure numpy; nothing here knows where pictures or features come from.
"""

from collections.abc import Callable, Sequence

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000


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
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"kernel distance of {len(x)} and {len(y)} pictures, expected 2 or more")

    def kernel_sum(a, b):
        # In blocks: the whole matrix of 30,000 pictures has 7 GB.
        parts = (a[i : i + 1024] @ b.T for i in range(0, len(a), 1024))
        return sum(((part / a.shape[1] + 1) ** 3).sum() for part in parts)

    def mean_of_pairs(a):
        with_itself = (((a * a).sum(1) / a.shape[1] + 1) ** 3).sum()
        return (kernel_sum(a, a) - with_itself) / (len(a) * (len(a) - 1))

    between = kernel_sum(x, y) / (len(x) * len(y))
    return float(mean_of_pairs(x) + mean_of_pairs(y) - 2 * between)


def bootstrap(
    statistic: Callable[[np.ndarray], float], strata: Sequence[int], seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of pictures.

    Args:
      statistic: from the indices of a resample to a number.
      strata: for each picture what it belongs to (its profession, say): resamples keep the number
        of pictures of each.
      seed: of the resamples.

    Returns:
      The bounds of the 95 % interval, over 1000 resamples.
    """
    rng = np.random.default_rng(seed)
    strata = np.asarray(strata)
    groups = [np.flatnonzero(strata == value) for value in np.unique(strata)]
    values = [
        statistic(np.concatenate([rng.choice(group, len(group)) for group in groups]))
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
