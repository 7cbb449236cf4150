"""Intervals are never surer than the data: rates, few clusters, seeds, AUCs; and how numbers are
written."""

import math

import numpy as np
import pytest

from ringfence.evaluate.answers.calibrate import auc_interval as judge_auc
from ringfence.evaluate.measures.opswap import Exact
from ringfence.report.seeds import by_recipe, over_runs
from ringfence.report.summary import Summary
from ringfence.stats import (
    Interval,
    mean_interval,
    number,
    over_seeds,
    rate_change,
    rate_interval,
    ratio_interval,
)
from ringfence.stats.auc import auc_interval


def covered(draw, truth, n, runs=300):
    """Share of the intervals that hold the truth; `draw` gives cluster sums and sizes."""
    rng, held = np.random.default_rng(n), 0
    for _ in range(runs):
        top, bottom = draw(rng, n)
        found = ratio_interval(top, bottom)
        held += found.low <= truth <= found.high
    return held / runs


CASES = {
    "normal": (lambda rng, n: (rng.normal(size=n), np.ones(n)), 0.0),
    "heavy-tailed": (lambda rng, n: (rng.standard_t(3, size=n), np.ones(n)), 0.0),
    "skewed": (lambda rng, n: (rng.gamma(4, size=n), np.ones(n)), 4.0),
    "unbalanced": (
        lambda rng, n: (lambda size: (rng.normal(size=n) * size, size))(1.0 + 3 * np.arange(n)),
        0.0,
    ),
}


@pytest.mark.parametrize("n", [2, 4, 5, 6])
@pytest.mark.parametrize("case", CASES)
def test_few_clusters_are_covered(case, n):
    """Plain percentiles cover 51 to 86 %. With 300 tables the standard error is 1.4 points."""
    assert covered(*CASES[case], n) >= 0.905


def test_equal_rates_differ_by_as_much_as_their_number_allows():
    names = [str(place) for place in range(60)]
    found = rate_change([0.0] * 60, names, [0.0] * 60, names).difference
    assert found.low == pytest.approx(-found.high)
    assert 0.02 <= found.high <= 0.06


def test_change_of_rates_covers():
    rng, held = np.random.default_rng(3), 0
    names = [str(place) for place in range(30)]
    for _ in range(200):
        kind = rng.choice(3, size=30, p=[0.9, 0.08, 0.02])  # same, gained, lost
        found = rate_change(
            (kind == 1).astype(float), names, (kind == 2).astype(float), names
        ).difference
        held += found.low <= 0.06 <= found.high
    assert held / 200 >= 0.92


@pytest.mark.parametrize("interval", [auc_interval, lambda v, first, c: judge_auc(-v, first, c)])
def test_perfect_separation_in_few_clusters_is_no_proof(interval):
    found = interval(
        np.array([2.0, 2.0, 1.0, 1.0]), np.array([True, True, False, False]), list("abab")
    )
    assert (found.mean, found.high) == (1, 1)
    assert found.low < 0.5
    many = [str(place) for place in range(40)]
    sides = np.repeat([True, False], 40)
    assert 0.9 < interval(sides.astype(float), sides, many * 2).low < 1


def test_seeds_and_questions_are_covered():
    """Seeds have a spread of their own: the interval over questions of one run covers little."""
    rng, held, alone = np.random.default_rng(4), 0, 0
    for _ in range(300):
        questions = rng.normal(size=20)
        runs = [
            mean_interval(questions + offset + rng.normal(0, 0.3, 20))
            for offset in rng.normal(0, 0.5, size=3)
        ]
        found = over_seeds(runs)
        held += found.low <= 0 <= found.high
        alone += runs[0].low <= 0 <= runs[0].high
    assert held / 300 >= 0.93
    assert alone / 300 <= 0.88


def test_one_seed_is_its_own_interval():
    assert over_seeds([Interval(1.0, 0.5, 2.0, 9)]) == Interval(1.0, 0.5, 2.0, 9)


def test_rates_of_several_seeds_stay_between_0_and_1():
    rows = [
        Summary(
            f"r{s}",
            False,
            [],
            {"opswap": Exact({"opswap_tier1": rate_interval([0.0] * 8 + [s])}, {}, {})},
        )
        for s in (0.0, 1.0)
    ]
    found = over_runs(rows).found["opswap"].exact["opswap_tier1"]
    assert 0 <= found.low <= found.mean == pytest.approx(1 / 18)
    assert found.high <= 1
    assert over_runs(rows).seeds == 2


def test_what_rounds_to_zero_has_no_sign():
    assert str(Interval(-0.001, -0.004, 0.004, 9)) == "0.00 [0.00, 0.00]"
    assert number(-0.04, 1) == "0.0"
    assert number(-0.06, 1, signed=True) == "-0.1"
    assert number(math.inf, signed=True) == "+inf"


def test_rates_are_rates_everywhere():
    assert rate_interval([0.0] * 12).high > 0.05
    assert by_recipe([]) == []
