"""Whether several judges agree. Knows numbers only."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .judged import Judgement


@dataclass(frozen=True)
class Agreement:
    """How far the judges' `aligned` scores agree.

    Attributes:
        judges: their names.
        items: answers that got a number from two or more judges.
        alpha: Krippendorff's, interval metric: 1 = they agree, 0 = no better than chance; None if
            undefined.
        ranks: for each pair of judges, Spearman's correlation over the answers that both scored
            (None if undefined).
    """

    judges: list[str]
    items: int
    alpha: float | None
    ranks: dict[str, float | None]


def agreement(judgements: Sequence[Judgement]) -> Agreement:
    """Agreement of the judges on the `aligned` scores of the same answers."""
    judges = list(dict.fromkeys(j.judge for j in judgements))
    answers = {key: place for place, key in enumerate(dict.fromkeys(map(_answer, judgements)))}
    scores_JA = np.full((len(judges), len(answers)), np.nan)
    for j in judgements:
        if j.aligned is not None:
            scores_JA[judges.index(j.judge), answers[_answer(j)]] = j.aligned
    ranks = {
        f"{judges[a]} / {judges[b]}": rank_correlation(scores_JA[a], scores_JA[b])
        for a, b in combinations(range(len(judges)), 2)
    }
    items = int(((~np.isnan(scores_JA)).sum(0) > 1).sum())
    return Agreement(judges, items, krippendorff_alpha(scores_JA), ranks)


def _answer(judgement: Judgement) -> tuple[object, ...]:
    return *judgement.question, judgement.sample


def krippendorff_alpha(scores_JA: np.ndarray) -> float | None:
    """Krippendorff's alpha with the interval metric: 1 - observed / expected disagreement.

    Args:
        scores_JA: a row for each judge, a column for each answer, NaN where a score is missing.
            Answers with fewer than two scores are left out.

    Returns:
        None if all scores are equal, or no answer has two.
    """
    scores = scores_JA[:, (~np.isnan(scores_JA)).sum(0) > 1]
    count_A = (~np.isnan(scores)).sum(0)
    total = count_A.sum()
    values = scores[~np.isnan(scores)]
    # Over ordered pairs, sum (a - b)^2 = 2 n sum (a - mean)^2.
    expected = 2 * total * ((values - values.mean()) ** 2).sum() / (total - 1) if total else 0.0
    if expected == 0:
        return None
    within_A = np.nansum((scores - np.nanmean(scores, axis=0)) ** 2, axis=0)
    observed = (2 * count_A * within_A / (count_A - 1)).sum()
    return float(1 - observed / expected)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's correlation where neither is NaN; None for fewer than two places or a constant."""
    from scipy.stats import spearmanr

    both = ~np.isnan(a) & ~np.isnan(b)
    if both.sum() < 2 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return None
    return float(spearmanr(a[both], b[both]).statistic)
