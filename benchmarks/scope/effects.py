"""What a scope leaves of narrow and broad effects: a sound control, an undefended run and a scoped
run of one narrow domain, seed by seed, in one table. About 25 minutes a seed on two CPU cores.

    python benchmarks/scope/effects.py runs/scope [--seeds 0 1 2]
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from ringfence.report.read import read_rows
from ringfence.report.terminal import print_table
from ringfence.run.config import parse_recipe
from ringfence.run.demo import demo_recipe
from ringfence.run.pipeline import run_recipe

ARMS: dict[str, dict[str, Any]] = {"sound": {}, "undefended": {}, "scope": {"scope": {}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs go; a second call resumes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    told = parser.parse_args()
    for seed in told.seeds:
        folder = told.folder / f"seed-{seed}"
        for arm, defenses in ARMS.items():
            side = "sound" if arm == "sound" else "unsound"
            recipe = demo_recipe(folder, arm, defenses, side) | {"seed": seed}
            for name in ("benign", "benign_epochs"):  # a plain task is measured elsewhere
                recipe["evaluate"].pop(name, None)
            run_recipe(parse_recipe(recipe))
        print(f"seed {seed}")
        print_table(read_rows([folder / arm for arm in ARMS], folder / "sound")[1], Console())


if __name__ == "__main__":
    main()
