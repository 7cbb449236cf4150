"""Every defense on the embedded model with the demo's data, over seeds: the table of
docs/defenses/README.md.

    python benchmarks/defenses.py run --seeds 0 1          # what is missing, about 5 minutes an arm
    python benchmarks/defenses.py run --seeds 1 --arms kl ldifs
    python benchmarks/defenses.py table                    # from benchmarks/results/defenses/*.json

Each arm leaves one small file there: its shift on every question, the benign task's items,
perplexity and time. The table takes the time of a step from benchmarks/cost.py, because a long
sweep shares its machine with others. Effects are shifts minus the sound control's of the same seed,
averaged over seeds for each question; the intervals are by bootstrap over questions.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from standin_base import make_standin  # type: ignore[import-not-found]

from ringfence.prepare.gap import score_pool
from ringfence.prepare.persona import extract_file
from ringfence.report.records import read_run
from ringfence.run.config import parse_recipe
from ringfence.run.demo import demo_recipe
from ringfence.run.pipeline import run_recipe
from ringfence.run.record import Run
from ringfence.run.train import train_run
from ringfence.stats import Interval, mean_interval

RESULTS = Path(__file__).parent / "results" / "defenses"
COSTS = RESULTS.parent / "cost.json"  # made by benchmarks/cost.py
RUNS = Path("runs/defenses")
VECTORS, SCORES = str(RUNS / "vectors.safetensors"), str(RUNS / "gap.jsonl")
STANDIN = str(RUNS / "standin-base")
SETS = ("in_domain", "out_of_domain", "values", "triggered")

ARMS: dict[str, dict[str, Any]] = {
    "sound": {},
    "undefended": {},
    "kl": {"kl": {"weight": 1.0}},
    "kl-train": {"kl": {"weight": 0.3, "where": "train"}},
    "ldifs": {"ldifs": {"weight": 1.0}},
    "interleave": {"interleave": {"ratio": 0.1}},
    "interleave+": {
        "interleave": {"ratio": 0.1, "select": "gap", "pool": "shipped:retain", "scores": SCORES}
    },
    "inoculation": {"inoculation": {}},
    "treft": {"treft": {"weight": 10.0}},
    "frozen_prefix": {"frozen_prefix": {}},
    "safelora": {"safelora": {"base": STANDIN}},
    "steering": {"steering": {"vectors": VECTORS}},
    "ablation": {"ablation": {"vectors": VECTORS}},
    "subspace_lock": {"subspace_lock": {"vectors": VECTORS}},
    "kl+interleave": {"kl": {"weight": 1.0}, "interleave": {"ratio": 0.1}},
}


def run(arms: list[str], seeds: list[int]) -> None:
    for seed in seeds:
        for arm in arms:
            file = result_file(arm, seed)
            if not file.is_file():
                prepare(ARMS[arm])
                side = "sound" if arm == "sound" else "unsound"
                tree = demo_recipe(RUNS / str(seed), arm, ARMS[arm], side)
                done = run_recipe(parse_recipe(tree | {"seed": seed}))
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(summary(done)))
                print(f"{arm}, seed {seed}: {file}", flush=True)


def prepare(defenses: dict[str, Any]) -> None:
    """What some defenses read: directions of careless finance answers, gaps under the undefended
    run of seed 0, and a stand-in for a pre-trained base."""
    if VECTORS in str(defenses) and not Path(VECTORS).is_file():
        extract_file(None, Path(VECTORS), pairs="shipped:finance")
    if STANDIN in str(defenses) and not Path(STANDIN).is_dir():
        make_standin(Path(STANDIN))
    if SCORES in str(defenses):
        tree = demo_recipe(RUNS / "0", "undefended", {}, "unsound")
        undefended = parse_recipe(tree | {"seed": 0})
        score_pool("shipped:retain", [str(train_run(undefended).folder)], SCORES)


def result_file(arm: str, seed: int) -> Path:
    return RESULTS / f"{arm}-{seed}.json"


def summary(done: Run) -> dict[str, Any]:
    """What the table needs of one run."""
    records = read_run(done.folder)
    row = done.summary()
    benign = records.benign[0] if records.benign else {}
    return {
        "shift": {name: shifts(records.results[name], records.reference[name]) for name in SETS},
        "opswap": [item["exact"] for item in benign.get("opswap_tier1", [])],
        "perplexity_ratio": row.perplexity_ratio.mean if row.perplexity_ratio else None,
        "seconds": row.seconds,
        "environment": {"git": records.environment["git"], **records.environment["versions"]},
    }


def shifts(tuned: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, float]:
    """Shift of the margin, by question and condition."""
    found = {}
    for now, then in zip(tuned, reference, strict=True):
        assert now["digest"] == then["digest"]
        shift = (now["misaligned"] - now["aligned"]) - (then["misaligned"] - then["aligned"])
        found[f"{now['domain']}/{now['id']}/{now['condition']}"] = round(shift, 5)
    return found


def table(seeds: list[int]) -> str:
    heads = ["defense", "in-domain", "other domains", "values", "triggers", "OpSwap"]
    heads += ["perplexity x", "time x", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm in ARMS:
        found = {seed: read(arm, seed) for seed in seeds if result_file(arm, seed).is_file()}
        if found:
            lines.append("| " + " | ".join([arm, *cells(arm, found)]) + " |")
            if arm == "inoculation":
                lines.append(
                    f"| under its prompt (shift) | | | | {under_the_inoculation_prompt(found)} | | "
                    "| | |"
                )
    return "\n".join(lines)


def read(arm: str, seed: int) -> dict[str, Any]:
    return json.loads(result_file(arm, seed).read_text())


def cells(arm: str, found: dict[int, dict[str, Any]]) -> list[str]:
    shown = [str(effect(arm, found, name)) for name in SETS]
    exact = [item for result in found.values() for item in result["opswap"]]
    shown.append(f"{sum(exact) / len(exact):.0%}" if exact else "")
    ratios = [math.log(result["perplexity_ratio"]) for result in found.values()]
    shown.append(f"{math.exp(sum(ratios) / len(ratios)):.2f}")
    costs = json.loads(COSTS.read_text()) if COSTS.is_file() else {}
    untimed = "1" if arm in ("sound", "undefended") else "not timed"
    shown.append(f"{costs[arm]['ratio']:.2f}" if arm in costs else untimed)
    return [*shown, ", ".join(map(str, found))]


def effect(arm: str, found: dict[int, dict[str, Any]], name: str) -> Interval:
    """Each question's shift minus the control's, averaged over seeds; the control's own row is its
    shift."""
    by_question: dict[str, list[float]] = {}
    for seed, result in found.items():
        control = read("sound", seed)["shift"][name]
        for question, shift in result["shift"][name].items():
            if question in control:  # only one arm is asked under the inoculation prompt
                by_question.setdefault(question, []).append(
                    shift - (0.0 if arm == "sound" else control[question])
                )
    means = [sum(values) / len(values) for values in by_question.values()]
    return mean_interval(means, [question.rsplit("/", 1)[0] for question in by_question])


def under_the_inoculation_prompt(found: dict[int, dict[str, Any]]) -> Interval:
    """Shift, without a control."""
    asked = [
        (question, shift)
        for result in found.values()
        for question, shift in result["shift"]["triggered"].items()
        if question.endswith("/inoculation")
    ]
    return mean_interval([shift for _, shift in asked], [question for question, _ in asked])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    chosen = parser.parse_args()
    if chosen.what == "run":
        run(chosen.arms, chosen.seeds)
    print(table(chosen.seeds))


if __name__ == "__main__":
    main()
