"""Does an adaptive weight reach its budget on the embedded model? The figure of
docs/defenses/budget.md.

    python benchmarks/budget.py    # four trainings of about four minutes each, without evaluation

The demo's rows, two epochs, at a learning rate that lets a penalty settle (1e-4, constant).
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt

from ringfence.run.config import parse_recipe
from ringfence.run.demo import demo_recipe
from ringfence.run.train import train_run

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "budget.png"
RUNS = Path("runs/budget")
BUDGETS: dict[str, list[float]] = {"kl": [0.05, 0.1], "treft": [0.003, 0.01]}


def main() -> None:
    figure, axes = plt.subplots(
        2, len(BUDGETS), figsize=(10, 5.5), sharex=True, constrained_layout=True
    )
    for (name, budgets), (penalty_axis, weight_axis) in zip(BUDGETS.items(), axes.T):
        for colour, budget in zip(("tab:blue", "tab:orange"), budgets):
            lines = trained(name, budget)
            steps, values = [line["step"] for line in lines], [line[name] for line in lines]
            second_half = mean(values[len(values) // 2 :])
            label = f"budget {budget:g}: second half {second_half:.3g}"
            print(
                f"{name}: {label}, weight at the end {lines[-1][f'{name}_weight']:.3g}", flush=True
            )
            penalty_axis.plot(steps, values, color=colour, label=label)
            penalty_axis.axhline(budget, color=colour, linestyle=":", linewidth=1)
            weight_axis.semilogy(steps, [line[f"{name}_weight"] for line in lines], color=colour)
        penalty_axis.set(title=f"{name}: penalty (dotted: its budget)", ylim=(0, 3 * max(budgets)))
        penalty_axis.legend(frameon=False)
        weight_axis.set(title=f"{name}: weight", xlabel="optimiser step")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def trained(name: str, budget: float) -> list[dict[str, Any]]:
    recipe = demo_recipe(RUNS, f"{name}-{budget:g}", {name: {"budget": budget}}, "unsound")
    recipe["train"] = recipe["train"] | {"schedule": "constant", "learning_rate": 1e-4, "epochs": 2}
    run = train_run(parse_recipe(recipe))
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
