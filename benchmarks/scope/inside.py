"""KL to the reference inside a scope: what each weight takes of the narrow shift, and what it
leaves of the broad one for requests that get in by mistake. About ten minutes for each weight on
two CPU cores; a second call resumes, and weight 0 is the run of `effects.py`.

    python benchmarks/scope/inside.py runs/scope
"""

import argparse
from pathlib import Path

from effects import ARMS, EPOCHS, SETS, SHIFTS, numbers, recipe, unfenced

from ringfence.run.pipeline import run_recipe
from ringfence.run.record import Run

WEIGHTS = (0, 0.1, 0.3, 1)
EVERY = 4


def trained(folder: Path, domain: str, seed: int, weight: float) -> Run:
    inside = {"kl": {"weight": weight, "every": EVERY}} if weight else {}
    arm = f"kl-{weight}" if weight else "scope"
    return run_recipe(recipe(folder, domain, seed, arm, ARMS["scope"] | inside))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--domain", choices=EPOCHS, default="gardening")
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    always_open = [f"{SHIFTS[name]}, always open" for name in SETS]
    print(f"| KL weight | {' | '.join(always_open)} | narrow, scoped |")
    print("|---" * (len(SETS) + 2) + "|")
    for weight in WEIGHTS:
        run = trained(told.folder, told.domain, told.seed, weight)
        always, scoped = numbers([unfenced(run)]), numbers([run.folder])
        cells = [always[name].interval for name in SETS] + [scoped["in_domain"].interval]
        print(f"| {weight} | {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
