"""The metrics against numbers worked out by hand and by other libraries."""

import numpy as np
import pytest
import scipy.linalg

from respodiff_jax.evaluation import metrics


@pytest.mark.parametrize(
    ("counts", "target", "expected"),
    [
        ((5, 5), None, 0.0),
        ((10, 0), None, 1.0),
        ((7, 3), None, 0.4),  # |0.7 - 0.5| / 0.5
        ((4, 4, 4), None, 0.0),
        ((12, 0, 0), None, 1.0),
        ((6, 3, 3), None, 0.25),  # |1/2 - 1/3| / (2/3)
        ((3, 1), (0.75, 0.25), 0.0),
        ((0, 4), (0.75, 0.25), 1.0),  # as far off as can be
        ((2, 2), (0.75, 0.25), 1 / 3),
    ],
)
def test_deviation_ratio_of_hand_made_counts(counts, target, expected):
    assert metrics.deviation_ratio(counts, target) == pytest.approx(expected)


def test_deviation_ratio_refuses_what_has_none():
    with pytest.raises(ValueError, match="1 attribute value"):
        metrics.deviation_ratio([3])
    with pytest.raises(ValueError, match="no pictures"):
        metrics.deviation_ratio([0, 0])


def test_frechet_distance_against_scipy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    y = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 0.5
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root)
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    # Fewer pictures than dimensions: the covariances are singular.
    few = metrics.frechet_distance(x[:5], y[:5])
    assert np.isfinite(few) and few > 0


def test_kernel_distance_by_loops():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(5, 4)) + 1

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    within_x = np.mean([kernel(x[i], x[j]) for i in range(6) for j in range(6) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([kernel(a, b) for a in x for b in y])
    expected = within_x + within_y - 2 * between
    assert metrics.kernel_distance(x, y) == pytest.approx(expected)
    # More pictures than a block: rows that repeat weigh the same.
    assert metrics.kernel_distance(np.tile(x, (400, 1)), y) == pytest.approx(
        np.mean((x @ x.T / 4 + 1) ** 3) * 2400 / 2399
        - np.mean((np.sum(x * x, 1) / 4 + 1) ** 3) / 2399
        + within_y
        - 2 * between
    )


def test_clip_score_is_the_positive_cosine_in_percent():
    images = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    texts = np.array([[1.0, 0.0]] * 3)
    np.testing.assert_allclose(metrics.clip_score(images, texts), [100, 60, 0])


def test_bootstrap_covers_the_mean_and_keeps_strata():
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(100):
        values = rng.normal(size=60)
        low, high = metrics.bootstrap(lambda i, v=values: v[i].mean(), np.zeros(60), seed)
        covered += low <= 0 <= high
    assert 85 <= covered <= 100  # of a 95 % interval
    # A stratum of one picture each leaves nothing to chance.
    values = rng.normal(size=5)
    low, high = metrics.bootstrap(lambda i: values[i].mean(), np.arange(5))
    assert low == high == pytest.approx(values.mean())
