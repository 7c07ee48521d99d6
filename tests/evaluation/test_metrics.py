"""The metrics against numbers computed by hand and by other libraries."""

import math

import numpy as np
import pytest
import scipy.linalg

from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import metrics


def frechet_distance(x, y):
    return metrics.frechet_contributions(x, y).mean()


def kernel_distance(x, y):
    return metrics.kernel_contributions(x, y).mean()


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
        ((0, 4), (0.75, 0.25), 1.0),  # as far away as possible
        ((2, 2), (0.75, 0.25), 1 / 3),
    ],
)
def test_deviation_ratio_of_counts_by_hand(counts, target, expected):
    assert metrics.deviation_ratio(counts, target) == pytest.approx(expected)


@pytest.mark.parametrize(("pictures", "expected"), [(10, 0.25), (150, 0.07)])
def test_few_pictures_of_a_fair_model_deviate_by_chance(pictures, expected):
    """The numbers of the report and the README, for two values."""
    mean = sum(
        math.comb(pictures, k) / 2**pictures * metrics.deviation_ratio([k, pictures - k])
        for k in range(pictures + 1)
    )
    assert round(mean, 2) == expected


def test_deviation_ratio_needs_pictures_and_two_values():
    with pytest.raises(UserError, match="1 attribute value"):
        metrics.deviation_ratio([3])
    with pytest.raises(UserError, match="no pictures"):
        metrics.deviation_ratio([0, 0])


def test_frechet_distance_equals_scipy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    y = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 0.5
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    # Fewer pictures than dimensions: the covariances are singular.
    few = frechet_distance(x[:5], y[:5])
    assert np.isfinite(few) and few > 0


def test_kernel_distance_equals_loops():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(5, 4)) + 1

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    within_x = np.mean([kernel(x[i], x[j]) for i in range(6) for j in range(6) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([kernel(a, b) for a in x for b in y])
    expected = within_x + within_y - 2 * between
    assert kernel_distance(x, y) == pytest.approx(expected)
    # More pictures than a block has; repeated rows weigh the same.
    assert kernel_distance(np.tile(x, (400, 1)), y) == pytest.approx(
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
    assert 85 <= covered <= 100  # for a 95 % interval
    # With one picture in each stratum, all resamples are alike.
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
def test_wilson_interval_equals_published_examples(count, n, expected):
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
def test_deviation_interval_contains_the_ratio(counts, target):
    low, high = metrics.deviation_interval(counts, target)
    assert 0 <= low <= metrics.deviation_ratio(counts, target) <= high <= 1 and low < high


def test_combined_interval_equals_hand_computation_and_covers():
    found = metrics.combined_interval([0.0, 0.0], [(0.0, 0.3), (0.0, 0.4)])
    assert found == pytest.approx((0, 0.25))  # sqrt(0.3^2 + 0.4^2) / 2
    assert metrics.combined_interval([0.2], [(0.1, 0.4)]) == pytest.approx((0.1, 0.4))
    rng, covered = np.random.default_rng(5), 0
    shares = np.linspace(0.2, 0.8, 20)
    for counts in rng.binomial(30, shares, (200, 20)):
        intervals = [metrics.wilson_interval(int(count), 30) for count in counts]
        low, high = metrics.combined_interval(counts / 30, intervals)
        covered += low <= shares.mean() <= high
    assert 180 <= covered <= 198


def test_deviation_interval_equals_hand_computation_and_covers():
    # For 10 of 10 the share p is within 0.7225 .. 1, so |p - 1/2| / (1/2) is within 0.445 .. 1.
    assert metrics.deviation_interval((10, 0)) == pytest.approx((0.445, 1), abs=1e-3)
    rng = np.random.default_rng(3)
    for shares in ((0.5, 0.5), (0.8, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.6, 0.3, 0.1)):
        true = metrics.deviation_ratio(shares)
        intervals = map(metrics.deviation_interval, rng.multinomial(30, shares, 200))
        assert sum(low <= true + 1e-9 and true - 1e-9 <= high for low, high in intervals) >= 184


def test_kernel_contributions_vary_as_the_distance_does():
    rng = np.random.default_rng(4)
    reference = rng.normal(size=(40, 3))
    samples = [rng.normal(size=(60, 3)) + 0.7 for _ in range(200)]
    found = [metrics.kernel_contributions(x, reference) for x in samples]
    spread = np.std([each.mean() for each in found])
    assert np.mean([each.std() / 60**0.5 for each in found]) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize(
    "contributions_of", [metrics.frechet_contributions, metrics.kernel_contributions]
)
def test_contributions_of_pairs_vary_as_the_distance_does(contributions_of):
    rng = np.random.default_rng(7)

    def pairs(change):
        x = rng.normal(size=(60, 4))
        other = (x + 0.3 * rng.normal(size=x.shape)) / 1.09**0.5  # distributed as x
        return other + change * np.array([1, 0, 0, 0]), x

    found = [contributions_of(*pairs(1.0), paired=True) for _ in range(300)]
    spread = np.std([each.mean() for each in found])
    assert np.mean([each.std() / 60**0.5 for each in found]) == pytest.approx(spread, rel=0.2)
    if contributions_of is metrics.kernel_contributions:
        # Pairs of one distribution have no distance, on average.
        means = [contributions_of(*pairs(0.0), paired=True).mean() for _ in range(300)]
        assert abs(np.mean(means)) < 3 * np.std(means) / 300**0.5
    else:
        x, y = pairs(1.0)
        assert contributions_of(x, y, True).mean() == pytest.approx(frechet_distance(x, y))


@pytest.mark.parametrize(("count", "width"), [(60, 3), (200, 16), (48, 64)])
def test_frechet_contributions_vary_as_the_distance_does(count, width):
    rng = np.random.default_rng(5)
    reference = rng.normal(size=(200, width))
    mixing = np.eye(width) + 0.3 * rng.normal(size=(width, width))
    samples = [rng.normal(size=(count, width)) @ mixing + 0.3 for _ in range(200)]
    found = [metrics.frechet_contributions(x, reference) for x in samples]
    spread = np.std([each.mean() for each in found])
    assert np.mean([each.std() / count**0.5 for each in found]) == pytest.approx(spread, rel=0.25)


@pytest.mark.parametrize("width", [3, 12])
def test_frechet_contribution_is_the_change_by_one_more_picture(width):
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(10, width)), rng.normal(size=(30, width)) @ rng.normal(size=2 * [width])
    many = np.tile(x, (1000, 1))
    contributions = metrics.frechet_contributions(many, y)[:10]
    more = np.array([frechet_distance(np.vstack([many, one]), y) for one in x])
    expected = contributions - contributions.mean()
    np.testing.assert_allclose(len(many) * (more - more.mean()), expected, rtol=1e-3, atol=1e-2)
