"""Confidence intervals and tests over clusters. Knows numbers only.

Values of one cluster (the samples of one question, the questions of one domain) are not independent, so clusters are
drawn, never values. Every interval is a 95 % interval.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import gammaln
from scipy.stats import norm, t

RESAMPLES = 4000
FLIPS = 9999
EXACT_UP_TO = 14  # clusters that differ: 16,384 ways to flip them
_GRID_R, _GRID_C = 300, 16  # places of the rate, of the correlation


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, over `n` clusters; one cluster alone bounds nothing."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} {self.bounds}"

    @property
    def bounds(self) -> str:
        return f"[{self.low:+.2f}, {self.high:+.2f}]" if self.n > 1 else "[one alone]"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def finite(value: Any) -> Any:
    """The same value for JSON, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------ intervals


def mean_interval(
    values: Sequence[float], clusters: Sequence[str] | None = None, seed: int = 0, widen: bool = False
) -> Interval:
    """Mean of `values` and its 95 % percentile-bootstrap interval.

    Args:
        clusters: a name per value; values of one cluster (the samples of one question, the questions of one domain) are
            drawn together, for they are not independent. Default: each value alone.
        widen: take the percentiles further out, as few clusters need, see `bounds`.
    """
    sums, counts = totals(values, clusters)
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    return Interval(mean, *bounds(_resampled(sums, counts, draws(len(sums), seed)), len(sums), widen), len(sums))


def ratio_interval(top: Sequence[float], bottom: Sequence[float], seed: int = 0) -> Interval:
    """sum(top) / sum(bottom), pairs drawn together."""
    if not len(top) or len(top) != len(bottom):
        raise ValueError(f"expected equally many values above and below, found {len(top)} and {len(bottom)}")
    a, b = np.asarray(top, float), np.asarray(bottom, float)
    low, high = bounds(_resampled(a, b, draws(len(a), seed)), len(a))
    return Interval(float(a.sum() / b.sum()), low, high, len(a))


def rate_interval(values: Sequence[float], clusters: Sequence[str] | None = None, seed: int = 0) -> Interval:
    """Mean of `values`, each from 0 to 1 (a yes or no, or a share), and an interval that is honest near 0 and near 1.

    Where no cluster shows what is counted, every bootstrap draw is 0 and the percentile interval is [0, 0], as if it
    could not occur. Here each end is the wider of two: the bootstrap's, with percentiles widened, and that of the
    posterior of the rate in a beta-binomial model, in which each cluster has its own rate. Its prior is Jeffreys' on
    the mean rate and flat on the correlation within a cluster: what few clusters cannot tell of that widens the
    interval. After only noes the high end is about 1.2 / clusters, hardly lower for more values in each. One cluster
    alone: [0, 1].

    Raises:
        ValueError: no values, or one outside 0 to 1.
    """
    sums, counts = totals(values, clusters)
    if min(values) < 0 or max(values) > 1:
        raise ValueError(f"expected values from 0 to 1, found {min(values)} to {max(values)}")
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Interval(mean, 0.0, 1.0, 1)
    first = bounds(_resampled(sums, counts, draws(len(sums), seed)), len(sums), widen=True)
    second = _posterior(sums, counts)
    return Interval(mean, min(mean, first[0], second[0]), max(mean, first[1], second[1]), len(sums))


def _posterior(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """2.5 and 97.5 % of the mean rate's posterior; 0 (1) is the end where all values are 0 (1)."""
    middles_R = np.sin((np.arange(_GRID_R) + 0.5) / _GRID_R * np.pi / 2) ** 2  # equal masses of Jeffreys' prior
    edges_R = np.sin(np.arange(_GRID_R + 1) / _GRID_R * np.pi / 2) ** 2
    correlation_C = (np.arange(_GRID_C) + 0.5) / _GRID_C
    size_C = 1 / correlation_C - 1
    yes_RC, no_RC = middles_R[:, None] * size_C, (1 - middles_R)[:, None] * size_C
    log_RC = np.zeros_like(yes_RC)
    kinds, times = np.unique(np.stack([sums, counts - sums]), axis=1, return_counts=True)
    for yes, no, number in zip(*kinds, times):
        log_RC += number * (gammaln(yes_RC + yes) + gammaln(no_RC + no) - gammaln(size_C + yes + no))
    log_RC += len(sums) * (gammaln(size_C) - gammaln(yes_RC) - gammaln(no_RC))
    below_R = np.concatenate([[0.0], np.exp(log_RC - log_RC.max()).sum(1).cumsum()])
    low, high = np.interp([0.025, 0.975], below_R / below_R[-1], edges_R)
    return 0.0 if not sums.any() else float(low), 1.0 if (sums == counts).all() else float(high)


def bounds(draws: np.ndarray, n: int, widen: bool = False) -> tuple[float, float]:
    """The 2.5 and 97.5 % percentiles of what bootstrap draws of `n` clusters gave.

    Args:
        widen: percentiles further out, so that the interval is as wide as Student's where the normal holds. The plain
            ones are too short by sqrt((n - 1) / n) and by normal against t: at 8 clusters 90 % instead of 95 %
            (Hesterberg, arXiv 1411.5279, "expanded percentile").
    """
    tail = float(norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1))) if widen else 0.025
    low, high = np.percentile(draws, [100 * tail, 100 * (1 - tail)])
    return float(low), float(high)


def draws(n: int, seed: int | np.random.Generator = 0) -> np.ndarray:
    """Bootstrap draws of `n` clusters: RESAMPLES rows of `n` places."""
    return np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))


def times_drawn(clusters_N: np.ndarray, seed: int | np.random.Generator = 0) -> np.ndarray:
    """Bootstrap draws of clusters, as how often each value was drawn, [RESAMPLES, N].

    Args:
        clusters_N: of each value, the number of its cluster, from 0.
    """
    number = int(clusters_N.max()) + 1
    counts_RC = np.stack([np.bincount(drawn, minlength=number) for drawn in draws(number, seed)])
    counts_RN: np.ndarray = counts_RC[:, clusters_N]
    return counts_RN


def drawn_interval(value: float, drawn_R: np.ndarray, n: int) -> Interval:
    """A statistic with the widened percentiles of what bootstrap draws of `n` clusters gave; draws in which it is not
    defined are left out."""
    return Interval(value, *bounds(drawn_R[np.isfinite(drawn_R)], n, widen=True), n)


def _resampled(sums: np.ndarray, counts: np.ndarray, draws: np.ndarray) -> np.ndarray:
    resampled: np.ndarray = sums[draws].sum(1) / counts[draws].sum(1)
    return resampled


def totals(
    values: Sequence[float], clusters: Sequence[str] | None, order: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cluster, in the order given or in that in which clusters occur."""
    if not len(values):
        raise ValueError("no values to average")
    names = list(clusters) if clusters is not None else [str(i) for i in range(len(values))]
    places = {name: place for place, name in enumerate(order or dict.fromkeys(names))}
    sums, counts = np.zeros(len(places)), np.zeros(len(places))
    for name, value in zip(names, values, strict=True):
        sums[places[name]] += value
        counts[places[name]] += 1
    return sums, counts


# ------------------------------------------------------------------ two groups told apart


def auc(first: np.ndarray, second: np.ndarray) -> float:
    """Chance that a value of the first is larger than one of the second, ties half."""
    values = np.concatenate([first, second])
    return _weighted_auc(*_levels(values), np.arange(len(values)) < len(first), np.ones(len(values)))


def auc_interval(values_R: np.ndarray, is_first_R: np.ndarray, clusters: Sequence[str], seed: int = 0) -> Interval:
    """`auc` of the values that are first over the others, and its 95 % percentile-bootstrap interval over clusters.

    Time and memory are linear in the number of values. One cluster alone bounds nothing.
    """
    levels_R, number = _levels(values_R)
    names = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    cluster_R = np.array([names[name] for name in clusters])
    mean = _weighted_auc(levels_R, number, is_first_R, np.ones(len(values_R)))
    if len(names) == 1:
        return Interval(mean, 0.0, 1.0, 1)
    random, found = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        times_C = np.bincount(random.integers(len(names), size=len(names)), minlength=len(names))
        found.append(_weighted_auc(levels_R, number, is_first_R, times_C[cluster_R]))
    return drawn_interval(mean, np.array(found), len(names))


def _levels(values: np.ndarray) -> tuple[np.ndarray, int]:
    """The rank of each value among the distinct ones, and how many these are."""
    distinct, level = np.unique(values, return_inverse=True)
    return level, len(distinct)


def _weighted_auc(levels_R: np.ndarray, number: int, is_first_R: np.ndarray, times_R: np.ndarray) -> float:
    """AUC where each value counts so many times; NaN where one side is empty."""
    first, second = (np.bincount(levels_R[side], times_R[side], number) for side in (is_first_R, ~is_first_R))
    below = second.cumsum() - second / 2
    with np.errstate(invalid="ignore"):
        return float(first @ below / (first.sum() * second.sum()))


# ------------------------------------------------------------------ two runs


@dataclass(frozen=True)
class Comparison:
    """A difference of means, and the p-value of the sign-flip test that there is none."""

    difference: Interval
    p: float


def paired_difference(
    a: Sequence[float], a_clusters: Sequence[str], b: Sequence[float], b_clusters: Sequence[str], seed: int = 0
) -> Comparison:
    """Mean of `a` minus mean of `b`, where both have values in the same clusters; they need not have equally many.

    The interval: clusters are drawn, and bring their values of both; percentiles widened. The p-value: see `sign_flip`,
    of each cluster's part in the difference. One cluster alone bounds nothing; its p is 1.
    """
    order = sorted({*a_clusters, *b_clusters})
    a_C, an_C = totals(a, a_clusters, order)
    b_C, bn_C = totals(b, b_clusters, order)
    mean = float(a_C.sum() / an_C.sum() - b_C.sum() / bn_C.sum())
    if len(order) == 1:
        return Comparison(Interval(mean, -math.inf, math.inf, 1), 1.0)
    drawn = draws(len(order), seed)
    with np.errstate(invalid="ignore"):
        means = _resampled(a_C, an_C, drawn) - _resampled(b_C, bn_C, drawn)
    interval = drawn_interval(mean, means, len(order))
    pooled = (a_C.sum() + b_C.sum()) / (an_C.sum() + bn_C.sum())
    # Parts of the difference; without `pooled`, a cluster with more values in one run would have a part in it by that.
    part_C = (a_C - pooled * an_C) / an_C.sum() - (b_C - pooled * bn_C) / bn_C.sum()
    return Comparison(interval, sign_flip(part_C, seed))


def sign_flip(differences: Sequence[float] | np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of the mean of `differences`, one for each cluster, if each could as well have the other sign.

    With up to 14 differences that are not 0 every way to flip them is counted, and p is exact (never below
    2 / 2 ** their number); with more, 9,999 random ways and the one that was found.
    """
    values = np.asarray(differences, float)
    values = values[np.abs(values) > 1e-12 * np.abs(values).max(initial=0.0)]
    n = len(values)
    if n <= EXACT_UP_TO:
        signs = 1.0 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(FLIPS, n))
        signs = np.concatenate([np.ones((1, n)), signs])
    as_far = np.abs(signs @ values) >= np.abs(values.sum()) - 1e-9 * np.abs(values).sum()
    return float(as_far.mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family of comparisons, adjusted (Holm 1979).

    Call all adjusted values up to 0.05 real, and the chance that any of them is not is at most 5 %.
    """
    p = np.asarray(p_values, float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"expected p-values from 0 to 1, found {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    return [float(value) for value in adjusted]
