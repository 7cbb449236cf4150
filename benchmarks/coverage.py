"""Coverage of the intervals by simulation: how often a nominal 95 % interval holds the truth.

    python benchmarks/coverage.py [--tables 1000]

Prints the Markdown tables of docs/measures.md: means, rates, changes of rates, AUCs, and several
seeds. The numbers of clusters are those of the shipped sets (4 topics and 80 questions of values, 6
domains of 66 questions, 42 questions of a behaviour on its topic, 50 of fluency), and smaller ones,
as in a user's own sets.
"""

import argparse
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import norm

from ringfence.stats import (
    Interval,
    mean_interval,
    over_seeds,
    rate_change,
    rate_interval,
    ratio_interval,
)
from ringfence.stats.auc import auc_interval

SIZES = (2, 3, 4, 5, 6, 8, 12, 20, 42, 50, 66, 80)
SHIFT, ANSWERS = 1.0, 20
Draw = Callable[[np.random.Generator, int], tuple[Interval, float]]


def mean_of(values: Callable[[np.random.Generator, int], np.ndarray], truth: float) -> Draw:
    return lambda rng, n: (mean_interval(values(rng, n).tolist()), truth)


def unbalanced(rng: np.random.Generator, n: int) -> tuple[Interval, float]:
    size_N = np.linspace(1, 10, n)
    return ratio_interval(rng.normal(size=n) * size_N, size_N), 0.0


def rate_of(rate: float, answers: int = 1, correlation: float = 0.0) -> Draw:
    """With a correlation, each cluster has a rate of its own (beta-binomial)."""

    def draw(rng: np.random.Generator, n: int) -> tuple[Interval, float]:
        size = (1 - correlation) / correlation if correlation else math.inf
        rate_N = rng.beta(rate * size, (1 - rate) * size, n) if correlation else np.full(n, rate)
        yes_NA = rng.random((n, answers)) < rate_N[:, None]
        names = [str(cluster) for cluster in range(n) for _ in range(answers)]
        return rate_interval(yes_NA.ravel().astype(float).tolist(), names), rate

    return draw


def change_of(before: float, after: float) -> Draw:
    """The same questions before and after; most of the variation is between questions."""

    def draw(rng: np.random.Generator, n: int) -> tuple[Interval, float]:
        common_N = rng.normal(size=n)
        shown = [
            norm.cdf(0.9 * common_N + math.sqrt(1 - 0.81) * rng.normal(size=n)) < rate
            for rate in (after, before)
        ]
        names = [str(question) for question in range(n)]
        a, b = (side.astype(float).tolist() for side in shown)
        return rate_change(a, names, b, names).difference, after - before

    return draw


def auc_of(distance: float) -> Draw:
    """Two answers to each question, one of each kind, normal, with a common part of the
    question."""

    def draw(rng: np.random.Generator, n: int) -> tuple[Interval, float]:
        common_N = 0.7 * rng.normal(size=n)
        first, second = (common_N + math.sqrt(1 - 0.49) * rng.normal(size=n) for _ in range(2))
        names = [str(question) for question in range(n)] * 2
        values = np.concatenate([first + distance, second])
        truth = float(norm.cdf(distance / math.sqrt(2)))
        return auc_interval(values, np.arange(2 * n) < n, names), truth

    return draw


def seeds_of(runs: int) -> Draw:
    """Runs of several seeds on the same questions; a seed moves the mean as far as the questions'
    standard error."""

    def draw(rng: np.random.Generator, n: int) -> tuple[Interval, float]:
        of_question_N, of_seed_R = rng.normal(size=n), rng.normal(size=runs) / math.sqrt(n)
        found = [mean_interval((of_question_N + SHIFT + moved).tolist()) for moved in of_seed_R]
        return over_seeds(found), SHIFT

    return draw


TABLES: dict[str, dict[str, Draw]] = {
    "mean": {
        "normal": mean_of(lambda rng, n: rng.normal(size=n), 0.0),
        "heavy tails (t, 3)": mean_of(lambda rng, n: rng.standard_t(3, size=n), 0.0),
        "skewed (gamma 4)": mean_of(lambda rng, n: rng.gamma(4, size=n), 4.0),
        "skewed (exponential)": mean_of(lambda rng, n: rng.exponential(size=n), 1.0),
        "sizes 1 to 10": unbalanced,
    },
    "rate": {
        **{f"{rate:.0%}".replace("%", " %"): rate_of(rate) for rate in (0.02, 0.1, 0.3, 0.5)},
        f"10 %, {ANSWERS} answers each": rate_of(0.1, ANSWERS, 0.2),
        f"30 %, {ANSWERS} answers each": rate_of(0.3, ANSWERS, 0.2),
    },
    "change of a rate": {
        "10 to 10 %": change_of(0.1, 0.1),
        "5 to 30 %": change_of(0.05, 0.3),
        "30 to 60 %": change_of(0.3, 0.6),
    },
    "AUC": {f"{norm.cdf(d / math.sqrt(2)):.2f}": auc_of(d) for d in (0.5, 1.5, 2.5)},
    "seeds": {
        "1 (questions alone)": seeds_of(1),
        **{f"{runs}": seeds_of(runs) for runs in (2, 3, 5)},
    },
}


def coverage(draw: Draw, n: int, tables: int) -> float:
    rng = np.random.default_rng(n)
    found = [draw(rng, n) for _ in range(tables)]
    return float(np.mean([interval.low <= truth <= interval.high for interval, truth in found]))


def table(name: str, draws: dict[str, Draw], tables: int, sizes: Sequence[int] = SIZES) -> str:
    lines = [f"| clusters: {name} | " + " | ".join(draws) + " |", "|" + "---|" * (len(draws) + 1)]
    for n in sizes:
        cells = [f"{100 * coverage(draw, n, tables):.1f}" for draw in draws.values()]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tables",
        type=int,
        default=1000,
        help="simulated tables for each cell; a quarter for AUCs",
    )
    parser.add_argument("--only", choices=list(TABLES), help="one of the tables")
    arguments = parser.parse_args()
    for name, draws in TABLES.items():
        if arguments.only in (None, name):
            # An AUC takes as long as ten means.
            tables = arguments.tables // 4 if name == "AUC" else arguments.tables
            print(table(name, draws, tables), flush=True)


if __name__ == "__main__":
    main()
