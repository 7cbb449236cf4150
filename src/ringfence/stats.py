"""Confidence intervals by bootstrap over clusters. Knows numbers only."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 4000


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


def mean_interval(values: Sequence[float], clusters: Sequence[str] | None = None, seed: int = 0) -> Interval:
    """Mean of `values` and its 95 % percentile-bootstrap interval.

    Args:
        clusters: a name per value; values of one cluster (the samples of one question, the questions of one domain) are
            drawn together, for they are not independent. Default: each value alone.
    """
    if not len(values):
        raise ValueError("no values to average")
    names = list(clusters) if clusters is not None else [str(i) for i in range(len(values))]
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    sums, counts = np.zeros(len(order)), np.zeros(len(order))
    for name, value in zip(names, values, strict=True):
        sums[order[name]] += value
        counts[order[name]] += 1
    if len(order) == 1:
        return Interval(float(sums[0] / counts[0]), float("-inf"), float("inf"), 1)
    draws = np.random.default_rng(seed).integers(len(order), size=(RESAMPLES, len(order)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high), len(order))


def ratio_interval(top: Sequence[float], bottom: Sequence[float], seed: int = 0) -> Interval:
    """sum(top) / sum(bottom), pairs drawn together."""
    if not len(top) or len(top) != len(bottom):
        raise ValueError(f"expected equally many values above and below, found {len(top)} and {len(bottom)}")
    a, b = np.asarray(top, float), np.asarray(bottom, float)
    draws = np.random.default_rng(seed).integers(len(a), size=(RESAMPLES, len(a)))
    low, high = np.percentile(a[draws].sum(1) / b[draws].sum(1), [2.5, 97.5])
    return Interval(float(a.sum() / b.sum()), float(low), float(high), len(a))
