import itertools
import math

import numpy as np
import pytest
from scipy import stats as theory

from ringfence.stats import (
    Interval,
    bounds,
    draws,
    holm,
    mean_interval,
    paired_difference,
    rate_interval,
    ratio_interval,
    sign_flip,
)


def clustered(rng, clusters=50, size=4, between=1.0, within=1.0):
    """Values with mean 0 whose clusters share an offset, and the cluster of each."""
    offsets = np.repeat(rng.normal(0, between, clusters), size)
    return offsets + rng.normal(0, within, clusters * size), np.repeat(
        np.arange(clusters), size
    ).astype(str)


def width(interval):
    return interval.high - interval.low


@pytest.mark.parametrize(
    ("n", "mean", "sd"), [(200, 0.0, 1.0), (500, -30.0, 0.01), (400, 5.0, 40.0)]
)
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
    assert width(mean_interval(values[:100])) / width(mean_interval(values)) == pytest.approx(
        4, rel=0.25
    )


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
    assert [tripled.mean, tripled.low, tripled.high] == pytest.approx(
        [once.mean, once.low, once.high]
    )


def test_unequal_clusters_by_enumeration():
    groups = {"a": [1.0, 2.0, 6.0], "b": [10.0], "c": [-4.0, 0.0]}
    values = [value for group in groups.values() for value in group]
    names = [name for name, group in groups.items() for _ in group]
    drawn = itertools.product(groups.values(), repeat=3)
    means = [np.mean([value for group in draw for value in group]) for draw in drawn]
    interval = mean_interval(values, names)
    assert interval.mean == pytest.approx(np.mean(values))
    assert interval.n == 3
    # The same bounds from the 27 equally likely draws, without chance; Kish's number of 3, 1 and 2
    # is 36 / 14.
    exact = bounds(float(np.mean(values)), np.array(means), 36 / 14)
    assert [interval.low, interval.high] == pytest.approx(exact, rel=0.1)
    assert exact[0] < min(means)
    assert exact[1] > max(means)


def delta_interval(top, bottom):
    """95 % interval of sum(top) / sum(bottom) by the delta method."""
    ratio = top.sum() / bottom.sum()
    error = np.std(top - ratio * bottom) / math.sqrt(len(top)) / bottom.mean()
    return [ratio - 1.96 * error, ratio + 1.96 * error], 0.25 * error


def test_large_clusters_weigh_more():
    sizes = np.random.default_rng(10).integers(1, 10, 300)
    values, names = (
        np.repeat(sizes, sizes).astype(float),
        np.repeat(np.arange(300), sizes).astype(str),
    )
    interval = mean_interval(values, names)
    expected, tolerance = delta_interval(sizes.astype(float) ** 2, sizes.astype(float))
    assert interval.mean == pytest.approx(values.mean())
    assert [interval.low, interval.high] == pytest.approx(expected, abs=tolerance)


def test_order_of_values_inside_clusters_does_not_matter():
    values, names = clustered(np.random.default_rng(4), clusters=9)
    at = np.concatenate([np.arange(0, 36, 4), np.delete(np.arange(36), np.arange(0, 36, 4))])
    shuffled, ordered = mean_interval(values[at], names[at]), mean_interval(values, names)
    assert [shuffled.mean, shuffled.low, shuffled.high] == pytest.approx(
        [ordered.mean, ordered.low, ordered.high]
    )


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


@pytest.mark.parametrize(
    ("top", "bottom"), [([], []), ([1.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [1.0, 2.0])]
)
def test_ratio_of_unlike_lists_is_refused(top, bottom):
    with pytest.raises(
        ValueError, match=f"equally many values .* found {len(top)} and {len(bottom)}"
    ):
        ratio_interval(top, bottom)


# ------------------------------------------------------------------ few clusters


@pytest.mark.parametrize("clusters", [8, 20])
def test_widened_percentiles_are_as_wide_as_students(clusters):
    values = np.random.default_rng(clusters).uniform(size=clusters)
    low, high = theory.t.interval(0.95, clusters - 1, values.mean(), theory.sem(values))
    # Wider by what is skewed.
    assert high - low <= width(mean_interval(values)) <= 1.2 * (high - low)


@pytest.mark.parametrize("n", [6, 8, 30])
def test_widened_percentiles_of_normal_draws_are_students_exactly(n):
    """A bootstrap mean has the sample's spread, sqrt((n - 1) / n) of Student's estimate."""
    normal = theory.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    quantile = theory.t.ppf(0.975, n - 1)
    found = bounds(0.0, normal * math.sqrt((n - 1) / n), n)
    assert found == pytest.approx((-quantile, quantile), rel=0.001)


def test_widened_percentiles_cover_where_plain_ones_do_not():
    rng = np.random.default_rng(11)
    runs, widened, plain = 300, 0, 0
    for seed in range(runs):
        values = rng.normal(size=6)
        one, two = (
            mean_interval(values, seed=seed),
            np.percentile(values[draws(6, seed)].mean(1), [2.5, 97.5]),
        )
        widened += one.low <= 0 <= one.high
        plain += two[0] <= 0 <= two[1]
    assert 0.92 <= widened / runs <= 0.98
    assert plain / runs <= 0.90


# ------------------------------------------------------------------ rates


def rows_of(yes, size):
    """Values of clusters of `size`, with so many ones each, and their names."""
    values = [float(i < count) for count in yes for i in range(size)]
    return values, [f"q{place}" for place in range(len(yes)) for _ in range(size)]


def naive_posterior(yes, size):
    """2.5 and 97.5 % of the mean rate, by sums over a fine grid of scipy's beta-binomial."""
    rate = (np.arange(2000) + 0.5) / 2000
    correlation = (np.arange(80) + 0.5) / 80
    a, b = np.outer(rate, 1 / correlation - 1), np.outer(1 - rate, 1 / correlation - 1)
    log = sum(theory.betabinom.logpmf(count, size, a, b) for count in yes)
    density = np.exp(log - log.max()).sum(1) / np.sqrt(rate * (1 - rate))
    below = density.cumsum() / density.sum()
    return rate[np.searchsorted(below, [0.025, 0.975])]


@pytest.mark.parametrize(
    ("yes", "size"), [([0, 1, 0, 0, 0, 0, 0, 0], 20), ([3, 4, 5, 4, 4, 3, 5], 8)]
)
def test_rate_interval_is_as_wide_as_the_posterior_where_that_is_wider(yes, size):
    interval, values = rate_interval(*rows_of(yes, size)), rows_of(yes, size)[0]
    boot = mean_interval(*rows_of(yes, size))
    low, high = naive_posterior(yes, size)
    assert interval.mean == pytest.approx(np.mean(values))
    assert interval.low == pytest.approx(max(0.0, min(low, boot.low)), abs=0.003)
    assert interval.high == pytest.approx(max(high, boot.high), abs=0.006)


@pytest.mark.parametrize(("clusters", "high"), [(6, 0.19), (12, 0.097), (36, 0.033), (100, 0.012)])
def test_after_only_noes(clusters, high):
    interval = rate_interval(*rows_of([0] * clusters, 50))
    assert (interval.mean, interval.low) == (0, 0)
    assert interval.high == pytest.approx(high, rel=0.06)
    assert interval.high == pytest.approx(1.2 / clusters, rel=0.08)
    turned = rate_interval(*rows_of([50] * clusters, 50))
    assert [turned.low, turned.high] == pytest.approx([1 - interval.high, 1])


def test_one_yes_never_makes_a_rate_look_safer():
    """The percentile bootstrap and variance-based intervals do."""
    highs = [rate_interval(*rows_of([count, *[0] * 11], 50)).high for count in (0, 1, 2, 5, 20, 50)]
    assert highs == sorted(highs)


def test_shares_between_0_and_1_are_values_too():
    interval = rate_interval([0.5, 0.25, 0.0, 0.0])
    assert interval.mean == pytest.approx(0.1875)
    assert 0 <= interval.low < 0.1875 < interval.high < 1
    assert rate_interval([0.3]) == Interval(0.3, 0.0, 1.0, 1)
    with pytest.raises(ValueError, match=r"from 0 to 1, found 0.5 to 30"):
        rate_interval([0.5, 30.0])


@pytest.mark.parametrize("clusters", [6, 12, 36])
@pytest.mark.parametrize(("mean", "correlation"), [(0.02, 0.1), (0.1, 0.3), (0.3, 0.1)])
def test_rate_interval_covers_beta_binomial_rates(clusters, mean, correlation):
    """Nominal 95 %. Rates near 0 are the hard ones: there the percentile bootstrap covers as little
    as a half."""
    rng = np.random.default_rng(clusters)
    runs, size = 80, 10
    held = 0
    a, b = mean * (1 / correlation - 1), (1 - mean) * (1 / correlation - 1)
    for seed in range(runs):
        interval = rate_interval(*rows_of(rng.binomial(size, rng.beta(a, b, clusters)), size), seed)
        held += interval.low <= mean <= interval.high
    assert held / runs >= 0.91


def test_the_coverage_test_sees_intervals_that_are_wrong():
    """The same simulation fails the percentile bootstrap near 0, and intervals that take answers
    for independent."""
    rng = np.random.default_rng(12)
    runs, size, clusters = 100, 10, 12
    percentile, independent = 0, 0
    for seed in range(runs):
        rare = rows_of(rng.binomial(size, rng.beta(0.02 * 9, 0.98 * 9, clusters)), size)
        interval = mean_interval(*rare, seed)
        percentile += interval.low <= 0.02 <= interval.high
        values, _ = rows_of(rng.binomial(size, rng.beta(0.3 * 2, 0.7 * 2, clusters)), size)
        interval = rate_interval(values, None, seed)
        independent += interval.low <= 0.3 <= interval.high
    assert percentile / runs <= 0.85
    # Theory for correlation 1/3: too short by sqrt(1 + 9 / 3), so it covers 67 %.
    assert independent / runs <= 0.80


# ------------------------------------------------------------------ two runs


def test_paired_difference_covers_and_its_test_holds_its_level():
    """Clusters share an offset in both runs; there is no difference. Nominal: 95 % covered, 5 % at
    most 0.05."""
    rng = np.random.default_rng(13)
    runs = 200
    for clusters in (8, 25):
        held, alarms, independent = 0, 0, 0
        names = np.repeat(np.arange(clusters), 4).astype(str)
        for seed in range(runs):
            shared = np.repeat(rng.normal(0, 3, clusters), 4)
            effect_a, effect_b = (np.repeat(rng.normal(0, 1, clusters), 4) for _ in range(2))
            a, b = (shared + e + rng.normal(0, 1, 4 * clusters) for e in (effect_a, effect_b))
            found = paired_difference(a, names, b, names, seed)
            held += found.difference.low <= 0 <= found.difference.high
            alarms += found.p <= 0.05
            independent += theory.ttest_rel(a, b).pvalue <= 0.05
        assert 0.91 <= held / runs <= 0.985
        assert 0.02 <= alarms / runs <= 0.085
        # Theory for answers taken for independent: too short by sqrt(1 + 3 * 0.5), so 22 %.
        assert independent / runs >= 0.14


def test_paired_difference_finds_what_is_there():
    rng = np.random.default_rng(14)
    shared, names = np.repeat(rng.normal(0, 3, 20), 4), np.repeat(np.arange(20), 4).astype(str)
    a, b = (shared + rng.normal(0, 1, 80) for _ in range(2))
    found = paired_difference(a + 1, names, b, names)
    assert found.difference.mean == pytest.approx(np.mean(a + 1 - b))
    assert found.difference.low > 0
    assert found.p < 0.01


def test_sign_flip_swaps_the_runs_cluster_by_cluster():
    """With equally many values it is the test that exchanges the two runs' values in a cluster, in
    all ways."""
    a, b = (
        [[1, 0, 1], [1, 1, 1], [0, 0, 1], [1, 1, 0]],
        [[0, 0, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]],
    )
    found = abs(np.sum(a) - np.sum(b))
    ways = [
        abs(sum(sum(x) - sum(y) if keep else sum(y) - sum(x) for x, y, keep in zip(a, b, kept)))
        for kept in itertools.product([True, False], repeat=4)
    ]
    names = np.repeat(list("abcd"), 3)
    p = paired_difference(np.ravel(a), names, np.ravel(b), names).p
    assert p == np.mean([way >= found for way in ways])


@pytest.mark.parametrize(
    ("values", "p"),
    [
        ([1.0, 1.0, 1.0, 1.0, 1.0], 2 / 32),
        ([3.0, 1.0], 2 / 4),
        ([0.3, -0.1, 0.2], 2 / 8 * 2),  # 0.4 from 0, as is 0.6: four of eight
        ([0.0, 0.0], 1.0),
        ([5.0, 0.0, 0.0, 0.0], 1.0),
        ([0.1, 0.2, -0.3], 1.0),  # rounding must not lose the ties with a sum of 0
    ],
)
def test_sign_flip_by_hand(values, p):
    assert sign_flip(values) == p


def test_sign_flip_by_random_flips_is_near_the_exact_value():
    values = np.random.default_rng(15).normal(0.5, 1, 15)
    signs = np.array(list(itertools.product([-1, 1], repeat=15)))
    exact = (np.abs(signs @ values) >= abs(values.sum()) - 1e-9).mean()
    assert sign_flip(values) == pytest.approx(exact, abs=4 * math.sqrt(exact / 9999))
    assert sign_flip(values) == sign_flip(values)
    assert sign_flip(np.ones(40)) == 1 / 10000  # never 0: the way that was found is one


def test_values_more_in_one_run_do_not_make_a_difference():
    """Cluster `a` has a high rate and, in the first run, more answers: the test must not take that
    for an effect."""
    a, b = [1.0] * 30 + [0.0] * 10, [1.0] * 10 + [0.0] * 10
    found = paired_difference(a, ["a"] * 30 + ["b"] * 10, b, ["a"] * 10 + ["b"] * 10)
    assert found.difference.mean == pytest.approx(0.25)
    assert found.difference.low <= 0
    assert found.p >= 0.5


def test_one_cluster_alone_compares_nothing():
    found = paired_difference([1.0, 1.0], ["q", "q"], [0.0, 0.0], ["q", "q"])
    assert found.difference == Interval(1.0, -math.inf, math.inf, 1)
    assert found.p == 1


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, and none below the one before: .02 .03
    # .06 .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.6]) == [1.0, 1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"from 0 to 1, found \[0.5, nan\]"):
        holm([0.5, math.nan])


def test_holm_keeps_the_error_of_a_family():
    p = np.random.default_rng(16).uniform(size=(2000, 5))
    wrong = np.mean([min(holm(list(row))) <= 0.05 for row in p])
    assert wrong == pytest.approx(0.05, abs=0.015)
    assert np.mean(p.min(1) <= 0.05) > 0.2  # without it
