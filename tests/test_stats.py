import itertools
import math

import numpy as np
import pytest
from scipy import stats as theory

from ringfence.stats import Interval, mean_interval, ratio_interval


def clustered(rng, clusters=50, size=4, between=1.0, within=1.0):
    """Values with mean 0 whose clusters share an offset, and the cluster of each."""
    offsets = np.repeat(rng.normal(0, between, clusters), size)
    return offsets + rng.normal(0, within, clusters * size), np.repeat(np.arange(clusters), size).astype(str)


def width(interval):
    return interval.high - interval.low


@pytest.mark.parametrize(("n", "mean", "sd"), [(200, 0.0, 1.0), (500, -30.0, 0.01), (400, 5.0, 40.0)])
def test_interval_of_the_mean_agrees_with_theory(n, mean, sd):
    values = np.random.default_rng(n).normal(mean, sd, n)
    interval = mean_interval(values)
    low, high = theory.norm.interval(0.95, values.mean(), values.std() / math.sqrt(n))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.n == n
    assert interval.low == pytest.approx(low, abs=0.06 * (high - low))
    assert interval.high == pytest.approx(high, abs=0.06 * (high - low))


def test_width_shrinks_with_the_root_of_n():
    values = np.random.default_rng(0).normal(size=1600)
    assert width(mean_interval(values[:100])) / width(mean_interval(values)) == pytest.approx(4, rel=0.25)


def test_coverage_on_clustered_data():
    rng = np.random.default_rng(1)
    runs = 300
    held, naive = 0, 0
    for seed in range(runs):
        values, names = clustered(rng)
        interval, ignoring = mean_interval(values, names, seed), mean_interval(values, None, seed)
        held += interval.low <= 0 <= interval.high
        naive += ignoring.low <= 0 <= ignoring.high
    assert 0.91 <= held / runs <= 0.98
    # Theory: an interval that is too short by sqrt(1 + 3 * 0.5) covers 78 %.
    assert 0.70 <= naive / runs <= 0.86


def test_clusters_of_one_are_like_no_clusters():
    values = np.random.default_rng(2).normal(size=60)
    assert mean_interval(values, [f"q{i}" for i in range(60)]) == mean_interval(values)


def test_copies_in_a_cluster_add_nothing():
    values = np.random.default_rng(3).normal(size=60)
    names = [f"q{i}" for i in range(60)]
    tripled = mean_interval(np.repeat(values, 3), np.repeat(names, 3))
    once = mean_interval(values)
    assert (tripled.n, once.n) == (60, 60)
    assert [tripled.mean, tripled.low, tripled.high] == pytest.approx([once.mean, once.low, once.high])


def test_unequal_clusters_by_enumeration():
    groups = {"a": [1.0, 2.0, 6.0], "b": [10.0], "c": [-4.0, 0.0]}
    values = [value for group in groups.values() for value in group]
    names = [name for name, group in groups.items() for _ in group]
    draws = itertools.product(groups.values(), repeat=3)
    means = [np.mean([value for group in draw for value in group]) for draw in draws]
    interval = mean_interval(values, names)
    assert interval.mean == pytest.approx(np.mean(values))
    assert interval.n == 3
    # Both extremes are one of 27 equally likely draws, hence more than 2.5 % each.
    assert [interval.low, interval.high] == pytest.approx([min(means), max(means)])


def delta_interval(top, bottom):
    """95 % interval of sum(top) / sum(bottom) by the delta method."""
    ratio = top.sum() / bottom.sum()
    error = np.std(top - ratio * bottom) / math.sqrt(len(top)) / bottom.mean()
    return [ratio - 1.96 * error, ratio + 1.96 * error], 0.25 * error


def test_large_clusters_weigh_more():
    sizes = np.random.default_rng(10).integers(1, 10, 300)
    values, names = np.repeat(sizes, sizes).astype(float), np.repeat(np.arange(300), sizes).astype(str)
    interval = mean_interval(values, names)
    expected, tolerance = delta_interval(sizes.astype(float) ** 2, sizes.astype(float))
    assert interval.mean == pytest.approx(values.mean())
    assert [interval.low, interval.high] == pytest.approx(expected, abs=tolerance)


def test_order_of_values_inside_clusters_does_not_matter():
    values, names = clustered(np.random.default_rng(4), clusters=9)
    at = np.concatenate([np.arange(0, 36, 4), np.delete(np.arange(36), np.arange(0, 36, 4))])
    shuffled, ordered = mean_interval(values[at], names[at]), mean_interval(values, names)
    assert [shuffled.mean, shuffled.low, shuffled.high] == pytest.approx([ordered.mean, ordered.low, ordered.high])


def test_seed():
    values = np.random.default_rng(5).normal(size=30)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1).low != mean_interval(values, seed=2).low


def test_constant_values_have_no_width_and_a_single_one_bounds_nothing():
    assert mean_interval([2.5] * 7) == Interval(2.5, 2.5, 2.5, 7)
    infinity = float("inf")
    assert mean_interval([3.0]) == Interval(3.0, -infinity, infinity, 1)
    assert mean_interval([1.0, 5.0], ["same", "same"]) == Interval(3.0, -infinity, infinity, 1)


def test_no_values_and_missing_names_are_refused():
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
    with pytest.raises(ValueError, match="zip"):
        mean_interval([1.0, 2.0], ["a"])


def test_text_and_record():
    interval = Interval(0.333, -0.05, 1.0, 8)
    assert str(interval) == "+0.33 [-0.05, +1.00]"
    assert interval.to_dict() == {"mean": 0.333, "low": -0.05, "high": 1.0, "n": 8}


# ------------------------------------------------------------------ ratio


def test_ratio_agrees_with_the_delta_method():
    rng = np.random.default_rng(6)
    bottom = rng.gamma(4, 1, 400)
    top = bottom**2 + rng.normal(0, 1, 400)
    interval = ratio_interval(top, bottom)
    expected, tolerance = delta_interval(top, bottom)
    assert interval.mean == pytest.approx(top.sum() / bottom.sum())
    assert interval.n == 400
    assert [interval.low, interval.high] == pytest.approx(expected, abs=tolerance)


def test_ratio_covers_the_truth():
    rng = np.random.default_rng(7)
    held = 0
    for seed in range(300):
        bottom = rng.gamma(4, 1, 60)
        interval = ratio_interval(0.7 * bottom + rng.normal(0, 1, 60), bottom, seed)
        held += interval.low <= 0.7 <= interval.high
    assert 0.91 <= held / 300 <= 0.98


def test_pairs_are_drawn_together():
    bottom = np.random.default_rng(8).gamma(1, 1, 50)
    interval = ratio_interval(0.3 * bottom, bottom)
    assert [interval.mean, interval.low, interval.high] == pytest.approx([0.3, 0.3, 0.3])


def test_ratio_over_one_is_a_mean():
    values = np.random.default_rng(9).normal(size=40)
    ratio, mean = ratio_interval(values, np.ones(40), 3), mean_interval(values, seed=3)
    assert [ratio.mean, ratio.low, ratio.high] == pytest.approx([mean.mean, mean.low, mean.high])


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [1.0, 2.0])])
def test_ratio_of_unlike_lists_is_refused(top, bottom):
    with pytest.raises(ValueError, match=f"equally many values .* found {len(top)} and {len(bottom)}"):
        ratio_interval(top, bottom)
