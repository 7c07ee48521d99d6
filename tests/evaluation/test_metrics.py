"""The metrics against numbers worked out by hand and by other libraries."""

import math

import numpy as np
import pytest
import scipy.linalg

from respodiff_jax.errors import UserError
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


@pytest.mark.parametrize(("pictures", "expected"), [(10, 0.25), (150, 0.07)])
def test_few_pictures_of_a_fair_model_deviate_by_chance(pictures, expected):
    """As the reports and the README say, of two values."""
    mean = sum(
        math.comb(pictures, k) / 2**pictures * metrics.deviation_ratio([k, pictures - k])
        for k in range(pictures + 1)
    )
    assert round(mean, 2) == expected


def test_deviation_ratio_refuses_what_has_none():
    with pytest.raises(UserError, match="1 attribute value"):
        metrics.deviation_ratio([3])
    with pytest.raises(UserError, match="no pictures"):
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
    # A stratum of one picture each leaves nothing to resample.
    assert metrics.mean_interval(rng.normal(size=5), np.arange(5)) is None
    assert metrics.mean_interval(np.ones(5)) is None
    assert metrics.mean_interval(np.array([0.5])) is None


@pytest.mark.parametrize(
    ("count", "n", "expected"),
    [
        (0, 10, (0.0, 0.2775)),  # Brown, Cai and DasGupta (2001)
        (10, 10, (0.7225, 1.0)),
        (5, 10, (0.2366, 0.7634)),
    ],
)
def test_wilson_interval_of_published_examples(count, n, expected):
    assert metrics.wilson_interval(count, n) == pytest.approx(expected, abs=1e-4)
    assert metrics.wilson_interval(count, n, 0.5)[1] <= expected[1]


@pytest.mark.parametrize(
    ("counts", "target"),
    [
        ((10, 0), None),
        ((5, 5), None),
        ((4, 4, 4), None),
        ((150, 0, 0), None),
        ((3, 1), (0.75, 0.25)),
        ((1, 0), (1.0, 0.0)),
        ((7, 0, 3, 2), (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_deviation_interval_holds_the_ratio_and_has_a_width(counts, target):
    low, high = metrics.deviation_interval(counts, target)
    assert 0 <= low <= metrics.deviation_ratio(counts, target) <= high <= 1 and low < high


def test_deviation_interval_by_hand_and_coverage():
    # Of 10 of 10 the share is within 0.7225 .. 1, so |p - 1/2| / (1/2) within 0.445 .. 1.
    assert metrics.deviation_interval((10, 0)) == pytest.approx((0.445, 1), abs=1e-3)
    rng = np.random.default_rng(3)
    for shares in ((0.5, 0.5), (0.8, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.6, 0.3, 0.1)):
        true = metrics.deviation_ratio(shares)
        intervals = map(metrics.deviation_interval, rng.multinomial(30, shares, 200))
        assert sum(low <= true + 1e-9 and true - 1e-9 <= high for low, high in intervals) >= 184


def test_parts_of_the_kernel_distance_spread_as_it_does():
    rng = np.random.default_rng(4)
    reference = rng.normal(size=(40, 3))
    samples = [rng.normal(size=(60, 3)) + 0.7 for _ in range(200)]
    parts = [metrics.kernel_parts(x, reference) for x in samples]
    assert parts[0].mean() == pytest.approx(metrics.kernel_distance(samples[0], reference))
    spread = np.std([p.mean() for p in parts])
    assert np.mean([p.std() / 60**0.5 for p in parts]) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("parts_of", [metrics.frechet_parts, metrics.kernel_parts])
def test_distances_of_pairs(parts_of):
    rng = np.random.default_rng(7)

    def pairs(change):
        x = rng.normal(size=(60, 4))
        other = (x + 0.3 * rng.normal(size=x.shape)) / 1.09**0.5  # distributed as x
        return other + change * np.array([1, 0, 0, 0]), x

    found = [parts_of(*pairs(1.0), paired=True) for _ in range(300)]
    spread = np.std([parts.mean() for parts in found])
    assert np.mean([parts.std() / 60**0.5 for parts in found]) == pytest.approx(spread, rel=0.2)
    if parts_of is metrics.kernel_parts:
        # Pairs of one distribution are at no distance, on average.
        means = [parts_of(*pairs(0.0), paired=True).mean() for _ in range(300)]
        assert abs(np.mean(means)) < 3 * np.std(means) / 300**0.5
    else:
        x, y = pairs(1.0)
        assert parts_of(x, y, True).mean() == pytest.approx(metrics.frechet_distance(x, y))


@pytest.mark.parametrize(("count", "width"), [(60, 3), (200, 16), (48, 64)])
def test_parts_of_the_frechet_distance_spread_as_it_does(count, width):
    rng = np.random.default_rng(5)
    reference = rng.normal(size=(200, width))
    mixing = np.eye(width) + 0.3 * rng.normal(size=(width, width))
    samples = [rng.normal(size=(count, width)) @ mixing + 0.3 for _ in range(200)]
    parts = [metrics.frechet_parts(x, reference) for x in samples]
    assert parts[0].mean() == pytest.approx(metrics.frechet_distance(samples[0], reference))
    spread = np.std([p.mean() for p in parts])
    assert np.mean([p.std() / count**0.5 for p in parts]) == pytest.approx(spread, rel=0.25)


@pytest.mark.parametrize("width", [3, 12])
def test_parts_of_the_frechet_distance_are_what_one_more_picture_changes(width):
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(10, width)), rng.normal(size=(30, width)) @ rng.normal(size=2 * [width])
    many = np.tile(x, (1000, 1))
    parts = metrics.frechet_parts(many, y)[:10]
    more = np.array([metrics.frechet_distance(np.vstack([many, one]), y) for one in x])
    np.testing.assert_allclose(
        len(many) * (more - more.mean()), parts - parts.mean(), rtol=1e-3, atol=1e-2
    )
