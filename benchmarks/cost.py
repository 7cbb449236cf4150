"""Time of a training step with each defense, against plain fine-tuning in the same series.

    python benchmarks/cost.py                # the embedded model; about 12 minutes on two CPU cores

Each arm trains a few steps on the demo's rows, between two runs of the undefended arm; the ratio is
that of the medians, without the first step. One-time work of an arm, such as reading directions, is
not included. Writes benchmarks/results/cost.json.
"""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from defenses import ARMS, RUNS, prepare  # type: ignore[import-not-found]
from ringfence.run.config import parse_recipe
from ringfence.run.demo import demo_recipe
from ringfence.run.train import train_run

RESULT = Path(__file__).parent / "results" / "cost.json"
STEPS = 8


def main() -> None:
    found: dict[str, Any] = {}
    before = step_seconds("undefended")
    for arm in [arm for arm in ARMS if arm not in ("sound", "undefended")]:
        prepare(ARMS[arm])
        seconds, after = step_seconds(arm), step_seconds("undefended")
        plain = median([*before, *after])
        found[arm] = {
            "seconds": round(median(seconds), 3),
            "plain": round(plain, 3),
            "ratio": round(median(seconds) / plain, 3),
        }
        print(
            f"{arm:15} {median(seconds):.2f} s a step, plain {plain:.2f} s, ratio "
            f"{median(seconds) / plain:.2f}",
            flush=True,
        )
        before = after
    RESULT.write_text(json.dumps(found, indent=1))


def step_seconds(arm: str) -> list[float]:
    """Seconds of each step except the first."""
    folder = RUNS / "cost"
    shutil.rmtree(folder / arm, ignore_errors=True)
    recipe = demo_recipe(folder, arm, ARMS[arm], "unsound")
    recipe["data"]["max_rows"] = STEPS * recipe["train"]["batch_size"]
    run = train_run(parse_recipe(recipe))
    ends = [
        json.loads(line)["seconds"]
        for line in (run.folder / "metrics.jsonl").read_text().splitlines()
    ]
    return [later - sooner for sooner, later in pairwise(ends)]


if __name__ == "__main__":
    main()
