"""Coverage of the intervals by simulation: how often a nominal 95 % interval holds the truth.

    python benchmarks/coverage.py [--tables 400]

Prints a Markdown table: clusters as many as the shipped sets have (4 topics of values, 6 domains, ...), by kind of
cluster. Knows `ringfence.stats` only.
"""

import argparse

import numpy as np

from ringfence.stats import ratio_interval

SIZES = (2, 3, 4, 5, 6, 10, 20, 80)
KINDS = ("normal", "heavy-tailed (t, 3)", "skewed (gamma 4)", "skewed (exponential)", "unbalanced 1:10")


def draw(kind: str, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Sums and sizes of `n` clusters, and the true mean."""
    if kind == "unbalanced 1:10":
        size_N = np.linspace(1, 10, n)
        return rng.normal(size=n) * size_N, size_N, 0.0
    values_N, truth = {
        "normal": (rng.normal(size=n), 0.0),
        "heavy-tailed (t, 3)": (rng.standard_t(3, size=n), 0.0),
        "skewed (gamma 4)": (rng.gamma(4, size=n), 4.0),
        "skewed (exponential)": (rng.exponential(size=n), 1.0),
    }[kind]
    return values_N, np.ones(n), truth


def coverage(kind: str, n: int, tables: int) -> float:
    rng, held = np.random.default_rng(n), 0
    for _ in range(tables):
        top_N, bottom_N, truth = draw(kind, n, rng)
        found = ratio_interval(top_N, bottom_N)
        held += found.low <= truth <= found.high
    return held / tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=400)
    tables = parser.parse_args().tables
    print("| clusters | " + " | ".join(KINDS) + " |\n|" + "---|" * (len(KINDS) + 1))
    for n in SIZES:
        print(f"| {n} | " + " | ".join(f"{100 * coverage(kind, n, tables):.0f} %" for kind in KINDS) + " |", flush=True)


if __name__ == "__main__":
    main()
