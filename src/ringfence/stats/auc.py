"""The AUC of two groups of values, with intervals over clusters. Knows numbers only."""

from collections.abc import Sequence

import numpy as np

from . import Interval, cluster_times, drawn_interval, rate_interval


def auc(first: np.ndarray, second: np.ndarray) -> float:
    """The chance that a value of the first is larger than one of the second; ties count half."""
    values = np.concatenate([first, second])
    return _weighted_auc(
        *_levels(values), np.arange(len(values)) < len(first), np.ones(len(values))
    )


def auc_interval(
    values_R: np.ndarray, is_first_R: np.ndarray, clusters: Sequence[str], seed: int = 0
) -> Interval:
    """`auc` of the first values over the others, and its 95 % interval over clusters.

    If the two are told apart without a mistake, every bootstrap draw is 1, as if none could occur.
    So if fewer than 5 clusters of a side hold a mistake (or anything right), each end is the widest
    of three: the bootstrap's, and two of `rate_interval`: the AUC is the mean, over the first, of
    the share of the second that each is above; and the same the other way round. 2 clusters without
    a mistake give about [0.3, 1] at best.

    Time and memory are linear in the number of values. A single cluster bounds nothing: [0, 1].
    """
    levels_R, number = _levels(values_R)
    names = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    cluster_R = np.array([names[name] for name in clusters])
    mean = _weighted_auc(levels_R, number, is_first_R, np.ones(len(values_R)))
    if len(names) == 1:
        return Interval(mean, 0.0, 1.0, 1)
    found = [
        _weighted_auc(levels_R, number, is_first_R, times_C[cluster_R])
        for times_C in cluster_times(len(names), seed)
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
    """The interval of an AUC (see `auc_interval`) from bootstrap draws of `n` clusters.

    Args:
        sides: for each of the two sides, the share of the other side that each of its values is
            ordered correctly against, and the values' clusters.
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
    """For each first value, the share of the second that it is above; for each second one, the
    share of the first that is above it."""
    first, second = (
        np.bincount(levels_R[side], minlength=number) for side in (is_first_R, ~is_first_R)
    )
    below = (second.cumsum() - second / 2) / second.sum()
    above = 1 - (first.cumsum() - first / 2) / first.sum()
    return below[levels_R[is_first_R]], above[levels_R[~is_first_R]]


def _levels(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Each value's rank among the distinct ones, and the number of these."""
    distinct, level = np.unique(values, return_inverse=True)
    return level, len(distinct)


def _weighted_auc(
    levels_R: np.ndarray, number: int, is_first_R: np.ndarray, times_R: np.ndarray
) -> float:
    """AUC in which each value counts this number of times; NaN if one side is empty."""
    first, second = (
        np.bincount(levels_R[side], times_R[side], number) for side in (is_first_R, ~is_first_R)
    )
    below = second.cumsum() - second / 2
    with np.errstate(invalid="ignore"):
        return float(first @ below / (first.sum() * second.sum()))
