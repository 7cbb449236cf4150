"""Confidence intervals and tests over clusters. Knows numbers only.

Values of one cluster (the samples of one question, the questions of one domain) are not independent, so clusters are
drawn, never values. Every interval is a 95 % interval.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import betaincinv, gammaln, ndtr, stdtrit  # scipy.stats takes a second to import

RESAMPLES = 4000
FLIPS = 9999
EXACT_UP_TO = 14  # clusters that differ: 16,384 ways to flip them
_GRID_R, _GRID_C = 300, 16  # places of the rate, of the correlation
LARGEST = 2.8  # Student's quantile up to which skewness moves an end: 5 clusters'
MANY, GRAINS = 60, 20  # clusters from which shares are rounded to so many parts in a posterior


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, over `n` clusters; one cluster alone bounds nothing."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{number(self.mean, signed=True)} {self.bounds}"

    @property
    def bounds(self) -> str:
        if self.n == 1:
            return "[one alone]"
        return f"[{number(self.low, signed=True)}, {number(self.high, signed=True)}]"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def number(value: float, digits: int = 2, signed: bool = False) -> str:
    """A number of a table: so many digits after the point; what rounds to 0 has no sign."""
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text.lstrip("+-") if not text.strip("+-0.") else text


def finite(value: Any) -> Any:
    """The same value for JSON, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stored(value: Any) -> Any:
    """What `finite` was stored of, as it is read: an interval without an end has an infinite one again."""
    if isinstance(value, list):
        return [stored(part) for part in value]
    if not isinstance(value, dict):
        return value
    ends = (
        {"mean": math.nan, "low": -math.inf, "high": math.inf}
        if value.keys() >= {"mean", "low", "high"}
        else {}
    )
    return {key: ends.get(key) if part is None else stored(part) for key, part in value.items()}


# ------------------------------------------------------------------ intervals


def mean_interval(
    values: Sequence[float], clusters: Sequence[str] | None = None, seed: int = 0
) -> Interval:
    """Mean of `values` and its 95 % interval by a bootstrap over clusters, see `bounds`.

    Args:
        clusters: a name per value; values of one cluster (the samples of one question, the
            questions of one domain) are drawn together, because they are not independent. Default:
            each value alone.
    """
    return _ratio(*totals(values, clusters), seed)


def ratio_interval(top: Sequence[float], bottom: Sequence[float], seed: int = 0) -> Interval:
    """sum(top) / sum(bottom), pairs drawn together. One pair alone bounds nothing."""
    if not len(top) or len(top) != len(bottom):
        raise ValueError(
            f"expected equally many values above and below, found {len(top)} and {len(bottom)}"
        )
    return _ratio(np.asarray(top, float), np.asarray(bottom, float), seed)


def _ratio(top: np.ndarray, bottom: np.ndarray, seed: int) -> Interval:
    value, n = float(top.sum() / bottom.sum()), len(top)
    if n == 1:
        return Interval(value, -math.inf, math.inf, 1)
    with np.errstate(all="ignore"):
        drawn = _resampled(top, bottom, n, seed)
    return drawn_interval(value, drawn, n, effective(bottom))


def effective(weights: np.ndarray) -> float:
    """How many clusters of equal weight tell as much (Kish): 5 of which one has nearly all count as 1, and few."""
    found = float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0
    return min(float(len(weights)), max(found, 2.0))


def rate_interval(
    values: Sequence[float], clusters: Sequence[str] | None = None, seed: int = 0
) -> Interval:
    """Mean of `values`, each from 0 to 1 (a yes or no, or a share), and an interval that is honest near 0 and near 1.

    Where no cluster shows what is counted, every bootstrap draw is 0 and the percentile interval is
    [0, 0], as if it could not occur. Where each cluster is one yes or no, the interval is the exact one
    (Clopper and Pearson 1934): after 12 noes [0, 0.26]. Else each end is the wider of two: the
    bootstrap's (see `bounds`), and that of the posterior of the rate in a beta-binomial model, in which
    each cluster has its own rate. Its prior is Jeffreys' on the mean rate and flat on the correlation
    within a cluster: what few clusters cannot tell of that widens the interval. One cluster alone:
    [0, 1].

    Raises:
        ValueError: no values, or one outside 0 to 1.
    """
    sums, counts = totals(values, clusters)
    if min(values) < 0 or max(values) > 1:
        raise ValueError(f"expected values from 0 to 1, found {min(values)} to {max(values)}")
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Interval(mean, 0.0, 1.0, 1)
    if (counts == 1).all() and np.isin(sums, (0.0, 1.0)).all():
        n, yes = len(sums), int(sums.sum())
        low = betaincinv(yes, n - yes + 1, 0.025) if yes else 0.0
        high = betaincinv(yes + 1, n - yes, 0.975) if yes < n else 1.0
        return Interval(mean, float(low), float(high), n)
    first, second = _ratio(sums, counts, seed), _posterior(sums, counts)
    low, high = min(mean, first.low, second[0]), max(mean, first.high, second[1])
    return Interval(mean, max(0.0, low), min(1.0, high), len(sums))


def _posterior(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """2.5 and 97.5 % of the mean rate's posterior; 0 (1) is the end where all values are 0 (1)."""
    none, all_of_them = not sums.any(), bool((sums == counts).all())
    middles_R = (
        np.sin((np.arange(_GRID_R) + 0.5) / _GRID_R * np.pi / 2) ** 2
    )  # equal masses of Jeffreys' prior
    edges_R = np.sin(np.arange(_GRID_R + 1) / _GRID_R * np.pi / 2) ** 2
    correlation_C = (np.arange(_GRID_C) + 0.5) / _GRID_C
    size_C = 1 / correlation_C - 1
    yes_RC, no_RC = middles_R[:, None] * size_C, (1 - middles_R)[:, None] * size_C
    log_RC = np.zeros_like(yes_RC)
    if len(sums) > MANY:  # as good as exact, and quick
        sums = np.round(sums / counts * GRAINS) / GRAINS * counts
    kinds, times = np.unique(np.stack([sums, counts - sums]), axis=1, return_counts=True)
    for yes, no, number in zip(*kinds, times):
        log_RC += number * (
            gammaln(yes_RC + yes) + gammaln(no_RC + no) - gammaln(size_C + yes + no)
        )
    log_RC += len(sums) * (gammaln(size_C) - gammaln(yes_RC) - gammaln(no_RC))
    below_R = np.concatenate([[0.0], np.exp(log_RC - log_RC.max()).sum(1).cumsum()])
    low, high = np.interp([0.025, 0.975], below_R / below_R[-1], edges_R)
    return 0.0 if none else float(low), 1.0 if all_of_them else float(high)


def bounds(value: float, draws: np.ndarray, n: float) -> tuple[float, float]:
    """95 % bounds of a statistic from what bootstrap draws of `n` clusters gave; each end is the
    widest of three.

    The plain percentiles never leave the range of the values seen, and cover 86 % at 6 clusters and
    51 % at 2. So:
    - percentiles further out, as wide as Student's where the normal holds ("expanded percentile",
      Hesterberg, arXiv 1411.5279);
    - Student's t with n - 1 degrees of freedom and the spread of the draws, which holds 95 % for 2
      normal clusters, too;
    - the same t, moved by the skewness of the draws (Johnson 1978): of skewed clusters a few seldom
      show the long tail. Of few values the skewness found is too small (at most (n - 2) / sqrt(n - 1)
      of n), so it counts up to three times: found by simulation of exponential clusters.

    Coverage by simulation: docs/measures.md.
    """
    quantile = float(stdtrit(n - 1, 0.975))
    tail = float(ndtr(-math.sqrt(n / (n - 1)) * quantile))
    low, high = np.percentile(draws, [100 * tail, 100 * (1 - tail)])
    spread = float(draws.std())
    if spread <= 1e-12 * max(abs(value), 1e-300):
        return min(value, float(low)), max(value, float(high))
    error = spread * math.sqrt(n / (n - 1))
    skewness = float((((draws - draws.mean()) / spread) ** 3).mean())
    few = min(3.0, (n + 4) / (n - 2)) if n > 2 else 3.0
    move = few * error * skewness * (1 + 2 * min(quantile, LARGEST) ** 2) / 6
    return (
        min(float(low), value - quantile * error + min(move, 0.0)),
        max(float(high), value + quantile * error + max(move, 0.0)),
    )


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


def drawn_interval(
    value: float, drawn_R: np.ndarray, n: int, equal: float | None = None
) -> Interval:
    """A statistic with the `bounds` of what bootstrap draws of `n` clusters gave; draws in which it is
    not defined are left out. One cluster alone bounds nothing.

    Args:
        equal: how many clusters of equal weight tell as much, see `effective`; default: n.
    """
    drawn_R = drawn_R[np.isfinite(drawn_R)]
    if n == 1 or not len(drawn_R):
        return Interval(value, -math.inf, math.inf, n)
    return Interval(value, *bounds(value, drawn_R, n if equal is None else equal), n)


def _resampled(sums: np.ndarray, counts: np.ndarray, n: int, seed: int) -> np.ndarray:
    centre = sums.sum() / counts.sum()  # around it float32 is exact enough
    top_R, bottom_R = (
        _times(n, seed, RESAMPLES) @ np.stack([sums - centre * counts, counts], 1).astype("f4")
    ).T
    resampled: np.ndarray = centre + top_R.astype(float) / bottom_R
    return resampled


@lru_cache(maxsize=16)
def _times(n: int, seed: int, resamples: int) -> np.ndarray:
    """`draws` as how often each cluster was drawn, [RESAMPLES, n]: a product with it is quicker than many sums."""
    at = draws(n, seed) + n * np.arange(resamples)[:, None]
    return np.bincount(at.ravel(), minlength=resamples * n).reshape(resamples, n).astype("f4")


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


def over_seeds(runs: Sequence[Interval]) -> Interval:
    """A measure of several runs that differ by seed alone: its mean, and an interval over seeds *and* questions.

    Each end adds two distances by squares: that of a run's own interval (over questions, the mean of
    the runs') and Student's of the runs' means, with runs - 1 degrees of freedom. Neither is known
    from the other: more questions do not tell what another seed does. One run: its own interval.
    """
    means = np.array([run.mean for run in runs])
    mean, error = float(means.mean()), 0.0
    if len(runs) > 1:
        error = float(stdtrit(len(runs) - 1, 0.975) * means.std(ddof=1) / math.sqrt(len(runs)))
    below, above = (
        np.mean([abs(getattr(run, end) - run.mean) for run in runs]) for end in ("low", "high")
    )
    n = min(run.n for run in runs)
    return Interval(
        mean, mean - math.hypot(float(below), error), mean + math.hypot(float(above), error), n
    )


# ------------------------------------------------------------------ two groups told apart


def auc(first: np.ndarray, second: np.ndarray) -> float:
    """Chance that a value of the first is larger than one of the second, ties half."""
    values = np.concatenate([first, second])
    return _weighted_auc(
        *_levels(values), np.arange(len(values)) < len(first), np.ones(len(values))
    )


def auc_interval(
    values_R: np.ndarray, is_first_R: np.ndarray, clusters: Sequence[str], seed: int = 0
) -> Interval:
    """`auc` of the values that are first over the others, and its 95 % interval over clusters.

    Where the two are told apart without a mistake, every draw of a bootstrap is 1, as if none could
    occur. So where fewer than 5 clusters of a side hold a mistake (or anything right), each end is the
    widest of three: the bootstrap's, and two of `rate_interval`: the AUC is the mean, over the first,
    of the share of the second that each is above; and the same the other way round. 2 clusters without
    a mistake give no more than [0.3, 1], about.

    Time and memory are linear in the number of values. One cluster alone bounds nothing: [0, 1].
    """
    levels_R, number = _levels(values_R)
    names = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    cluster_R = np.array([names[name] for name in clusters])
    mean = _weighted_auc(levels_R, number, is_first_R, np.ones(len(values_R)))
    if len(names) == 1:
        return Interval(mean, 0.0, 1.0, 1)
    found = [
        _weighted_auc(levels_R, number, is_first_R, times_C[cluster_R])
        for times_C in _times(len(names), seed, RESAMPLES)
    ]
    names_R, shares = np.asarray(clusters), _placements(levels_R, number, is_first_R)
    sides = [(shares[0], names_R[is_first_R]), (shares[1], names_R[~is_first_R])]
    return auc_bounds(mean, np.array(found), len(names), sides, seed)


def auc_bounds(
    mean: float,
    drawn_R: np.ndarray,
    n: int,
    sides: Sequence[tuple[np.ndarray, np.ndarray]],
    seed: int = 0,
) -> Interval:
    """The interval of an AUC, see `auc_interval`, from what bootstrap draws of `n` clusters gave.

    Args:
        sides: for each of the two sides, the share of the other side that each of its values is on the
            right side of, and the values' clusters.
    """
    found = [drawn_interval(mean, drawn_R, n)]
    mixed = [
        min(len(np.unique(names[shares < 1])), len(np.unique(names[shares > 0])))
        for shares, names in sides
    ]
    if min(mixed) < 5:
        found += [
            rate_interval(shares.clip(0, 1).tolist(), names.tolist(), seed)
            for shares, names in sides
        ]
    return Interval(
        mean, max(0.0, min(i.low for i in found)), min(1.0, max(i.high for i in found)), n
    )


def _placements(
    levels_R: np.ndarray, number: int, is_first_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each first value the share of the second that it is above; of each second one that of the first above it."""
    first, second = (
        np.bincount(levels_R[side], minlength=number) for side in (is_first_R, ~is_first_R)
    )
    below = (second.cumsum() - second / 2) / second.sum()
    above = 1 - (first.cumsum() - first / 2) / first.sum()
    return below[levels_R[is_first_R]], above[levels_R[~is_first_R]]


def _levels(values: np.ndarray) -> tuple[np.ndarray, int]:
    """The rank of each value among the distinct ones, and how many these are."""
    distinct, level = np.unique(values, return_inverse=True)
    return level, len(distinct)


def _weighted_auc(
    levels_R: np.ndarray, number: int, is_first_R: np.ndarray, times_R: np.ndarray
) -> float:
    """AUC where each value counts so many times; NaN where one side is empty."""
    first, second = (
        np.bincount(levels_R[side], times_R[side], number) for side in (is_first_R, ~is_first_R)
    )
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
    a: Sequence[float],
    a_clusters: Sequence[str],
    b: Sequence[float],
    b_clusters: Sequence[str],
    seed: int = 0,
) -> Comparison:
    """Mean of `a` minus mean of `b`, where both have values in the same clusters; they need not have equally many.

    The interval: clusters are drawn, and bring their values of both. The p-value: see `sign_flip`,
    of each cluster's part in the difference. One cluster alone bounds nothing; its p is 1.
    """
    order = sorted({*a_clusters, *b_clusters})
    a_C, an_C = totals(a, a_clusters, order)
    b_C, bn_C = totals(b, b_clusters, order)
    mean = float(a_C.sum() / an_C.sum() - b_C.sum() / bn_C.sum())
    if len(order) == 1:
        return Comparison(Interval(mean, -math.inf, math.inf, 1), 1.0)
    with np.errstate(invalid="ignore"):
        means = _resampled(a_C, an_C, len(order), seed) - _resampled(b_C, bn_C, len(order), seed)
    interval = drawn_interval(mean, means, len(order))
    pooled = (a_C.sum() + b_C.sum()) / (an_C.sum() + bn_C.sum())
    # Parts of the difference; without `pooled`, a cluster with more values in one run would have a part in it by that.
    part_C = (a_C - pooled * an_C) / an_C.sum() - (b_C - pooled * bn_C) / bn_C.sum()
    return Comparison(interval, sign_flip(part_C, seed))


def rate_change(
    a: Sequence[float],
    a_clusters: Sequence[str],
    b: Sequence[float],
    b_clusters: Sequence[str],
    seed: int = 0,
) -> Comparison:
    """`paired_difference` of values from 0 to 1, with an interval that is honest where hardly any cluster differs.

    Where none differs, every bootstrap draw is 0, as if no change could occur. So where few differ (or
    each cluster holds one yes or no) each end is the wider of two: the bootstrap's, and that of gains
    and losses (what a cluster has more in `a`, or less), each with its `rate_interval` and joined by
    squares, as Newcombe (1998) joins two rates.
    """
    found = paired_difference(a, a_clusters, b, b_clusters, seed)
    if found.difference.n == 1:
        return found
    order = sorted({*a_clusters, *b_clusters})
    (a_C, an_C), (b_C, bn_C) = totals(a, a_clusters, order), totals(b, b_clusters, order)
    both_C = (an_C > 0) & (bn_C > 0)
    if both_C.sum() < 2:
        return Comparison(Interval(found.difference.mean, -1.0, 1.0, found.difference.n), found.p)
    change_C = a_C[both_C] / an_C[both_C] - b_C[both_C] / bn_C[both_C]
    is_whole = np.isin(change_C, (-1.0, 0.0, 1.0)).all()
    if not is_whole and np.count_nonzero(change_C) >= min(5, len(change_C) / 2):
        return found
    gain, loss = (
        rate_interval((sign * change_C).clip(0, 1).tolist(), None, seed) for sign in (1, -1)
    )
    mean = found.difference.mean
    low = mean - math.hypot(gain.mean - gain.low, loss.high - loss.mean)
    high = mean + math.hypot(gain.high - gain.mean, loss.mean - loss.low)
    low, high = (
        max(-1.0, min(low, found.difference.low)),
        min(1.0, max(high, found.difference.high)),
    )
    return Comparison(Interval(mean, low, high, found.difference.n), found.p)


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
