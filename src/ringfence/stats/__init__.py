"""Confidence intervals and tests over clusters. Knows numbers only.

Values of one cluster (the samples of one question, the questions of one domain) are not
independent, so clusters are drawn, never values. Every interval is a 95 % interval.
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
_GRID_R, _GRID_C = 300, 16  # grid points of the rate and of the correlation
LARGEST = 2.8  # Student's quantile up to which skewness moves an end: that of 5 clusters
MANY, GRAINS = 60, 20  # with more clusters than 60, a posterior rounds shares to 20ths


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, over `n` clusters; a single cluster bounds nothing."""

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
    """A number for a table, with this many digits after the point; what rounds to 0 has no sign."""
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text.lstrip("+-") if not text.strip("+-0.") else text


def finite(value: Any) -> Any:
    """The value for JSON, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stored(value: Any) -> Any:
    """Undoes `finite` on reading: an interval's missing end is infinite again."""
    if isinstance(value, list):
        return [stored(part) for part in value]
    if not isinstance(value, dict):
        return value
    ends = {"mean": math.nan, "low": -math.inf, "high": math.inf}
    ends = ends if value.keys() >= ends.keys() else {}
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
    """sum(top) / sum(bottom), pairs drawn together. A single pair bounds nothing."""
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
    """The number of equally weighted clusters that tell as much (Kish), at least 2: 5 of which one
    has nearly all the weight tell little."""
    found = float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0
    return min(float(len(weights)), max(found, 2.0))


def rate_interval(
    values: Sequence[float], clusters: Sequence[str] | None = None, seed: int = 0
) -> Interval:
    """Mean of `values`, each from 0 to 1 (a yes or no, or a share), and an interval that is honest
    near 0 and near 1.

    If no cluster shows what is counted, every bootstrap draw is 0 and the percentile interval is
    [0, 0], as if it could not occur. If each cluster is one yes or no, the interval is the exact
    one (Clopper and Pearson 1934): after 12 noes [0, 0.26]. Otherwise each end is the wider of two:
    the bootstrap's (see `bounds`), and that of the posterior of the rate in a beta-binomial model,
    in which each cluster has its own rate. Its prior is Jeffreys' on the mean rate and flat on the
    correlation within a cluster: the less few clusters say about that correlation, the wider the
    interval. A single cluster: [0, 1].

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
    """2.5 and 97.5 % of the mean rate's posterior; the end is 0 (1) if all values are 0 (1)."""
    none, all_of_them = not sums.any(), bool((sums == counts).all())
    # Equal masses of Jeffreys' prior.
    middles_R = np.sin((np.arange(_GRID_R) + 0.5) / _GRID_R * np.pi / 2) ** 2
    edges_R = np.sin(np.arange(_GRID_R + 1) / _GRID_R * np.pi / 2) ** 2
    correlation_C = (np.arange(_GRID_C) + 0.5) / _GRID_C
    size_C = 1 / correlation_C - 1
    yes_RC, no_RC = middles_R[:, None] * size_C, (1 - middles_R)[:, None] * size_C
    log_RC = np.zeros_like(yes_RC)
    if len(sums) > MANY:  # as good as exact, and fast
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
    """95 % bounds of a statistic from bootstrap draws of `n` clusters; each end is the widest of
    three.

    The plain percentiles never leave the range of the observed values, and cover 86 % at 6 clusters
    and 51 % at 2. So the three are:
    - percentiles further out, as wide as Student's under normality ("expanded percentile",
      Hesterberg, arXiv 1411.5279);
    - Student's t with n - 1 degrees of freedom and the spread of the draws, which covers 95 % even
      for 2 normal clusters;
    - the same t, moved by the skewness of the draws (Johnson 1978): a few skewed clusters seldom
      show the long tail. The skewness of few values comes out too small (at most (n - 2) / sqrt(n -
      1) for n), so it counts up to three times, as simulation of exponential clusters showed.

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
        clusters_N: the number of each value's cluster, from 0.
    """
    number = int(clusters_N.max()) + 1
    counts_RC = np.stack([np.bincount(drawn, minlength=number) for drawn in draws(number, seed)])
    counts_RN: np.ndarray = counts_RC[:, clusters_N]
    return counts_RN


def drawn_interval(
    value: float, drawn_R: np.ndarray, n: int, equal: float | None = None
) -> Interval:
    """A statistic with its `bounds` from bootstrap draws of `n` clusters; draws in which it is
    undefined are left out. A single cluster bounds nothing.

    Args:
        equal: the number of equally weighted clusters that tell as much, see `effective`; default:
            n.
    """
    drawn_R = drawn_R[np.isfinite(drawn_R)]
    if n == 1 or not len(drawn_R):
        return Interval(value, -math.inf, math.inf, n)
    return Interval(value, *bounds(value, drawn_R, n if equal is None else equal), n)


def _resampled(sums: np.ndarray, counts: np.ndarray, n: int, seed: int) -> np.ndarray:
    centre = sums.sum() / counts.sum()  # around it, float32 is exact enough
    values_N2 = np.stack([sums - centre * counts, counts], 1).astype("f4")
    top_R, bottom_R = (cluster_times(n, seed) @ values_N2).T
    resampled: np.ndarray = centre + top_R.astype(float) / bottom_R
    return resampled


def cluster_times(n: int, seed: int) -> np.ndarray:
    """`draws` as how often each cluster was drawn, [RESAMPLES, n]."""
    return _times(n, seed, RESAMPLES)


@lru_cache(maxsize=16)
def _times(n: int, seed: int, resamples: int) -> np.ndarray:
    """See `cluster_times`; a product with it is faster than many sums."""
    at = draws(n, seed) + n * np.arange(resamples)[:, None]
    return np.bincount(at.ravel(), minlength=resamples * n).reshape(resamples, n).astype("f4")


def totals(
    values: Sequence[float], clusters: Sequence[str] | None, order: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of each cluster's values, in the order given or else in order of
    occurrence."""
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
    """A measure of several runs that differ only by seed: its mean, and an interval over seeds
    *and* questions.

    Each end adds the squares of two distances: that of a run's own interval (over questions; the
    runs' mean) and Student's of the runs' means, with runs - 1 degrees of freedom. Neither follows
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
    low = mean - math.hypot(float(below), error)
    return Interval(mean, low, mean + math.hypot(float(above), error), n)


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
    """Mean of `a` minus mean of `b`, which have values in the same clusters, not necessarily
    equally many.

    The interval: each drawn cluster brings its values of both. The p-value: `sign_flip` of each
    cluster's part in the difference. A single cluster bounds nothing; its p is 1.
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
    # Parts of the difference; without `pooled`, a cluster would contribute just by having more
    # values in one run.
    part_C = (a_C - pooled * an_C) / an_C.sum() - (b_C - pooled * bn_C) / bn_C.sum()
    return Comparison(interval, sign_flip(part_C, seed))


def rate_change(
    a: Sequence[float],
    a_clusters: Sequence[str],
    b: Sequence[float],
    b_clusters: Sequence[str],
    seed: int = 0,
) -> Comparison:
    """`paired_difference` of values from 0 to 1, with an interval that is honest if hardly any
    cluster differs.

    If none differs, every bootstrap draw is 0, as if no change could occur. So if few differ (or
    each cluster holds one yes or no), each end is the wider of two: the bootstrap's, and that of
    gains and losses (what a cluster has more in `a`, or less), each with its `rate_interval` and
    joined by squares, as Newcombe (1998) joins two rates.
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
    low = max(-1.0, min(low, found.difference.low))
    high = min(1.0, max(high, found.difference.high))
    return Comparison(Interval(mean, low, high, found.difference.n), found.p)


def sign_flip(differences: Sequence[float] | np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of the mean of `differences`, one for each cluster, under random signs.

    With up to 14 non-zero differences, every way to flip them is counted, and p is exact (never
    below 2 / 2 ** their number); with more, 9,999 random ways and the observed one.
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

    If all comparisons with adjusted values up to 0.05 are called real, the chance that any of them
    is not is at most 5 %.
    """
    p = np.asarray(p_values, float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"expected p-values from 0 to 1, found {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    return [float(value) for value in adjusted]
