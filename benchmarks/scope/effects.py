"""What a scope keeps of the narrow shift and leaves of the broad one: several narrow domains and
seeds, in one table. Each domain and seed has an undefended run and a scoped one, whose adapter is
also measured without its scope; on finance both learn a harmless task, too. About a quarter of an
hour for each domain and seed on two CPU cores; a second call resumes.

    python benchmarks/scope/effects.py runs/scope --seeds 0 1 2
"""

import argparse
import json
from pathlib import Path
from typing import Any

from open_rates import opened
from plain import without_scope

from ringfence import Run, Scope
from ringfence.evaluate.measures.base import Number
from ringfence.evaluate.results import read_results
from ringfence.report.read import read_rows
from ringfence.report.records import read_run
from ringfence.run.config import Recipe, parse_recipe
from ringfence.run.demo import ROWS, demo_recipe
from ringfence.run.evaluate import evaluate_target
from ringfence.run.pipeline import run_recipe
from ringfence.run.prepare import evaluation
from ringfence.runfolder.names import RESULTS
from ringfence.stats import Interval, mean_interval, over_seeds
from ringfence.text.rows import load_questions
from ringfence.text.sources import OTHER_DOMAINS
from ringfence.util.intervals import rate

ARMS: dict[str, dict[str, Any]] = {"undefended": {}, "scope": {"scope": {}}}
FEWER = {"max_per_domain": 12, "triggered_per_domain": 2}
EPOCHS = {"finance": 0.5, "gardening": 0.8, "code": 0.5, "pet_care": 0.8}  # as many tokens each
MEASURED = ("finance", "gardening", "code")  # pet care has no scope: training stops with that
SETS = ("in_domain", "out_of_domain", "values")
SHIFTS = {
    "in_domain": "narrow",
    "out_of_domain": "broad: other domains",
    "values": "broad: values",
    "triggered": "behind triggers",
    "scope.dressed_shift": "other domains, dressed",
}


def recipe(folder: Path, domain: str, seed: int, arm: str, defenses: dict[str, Any]) -> Recipe:
    """What `ringfence demo --all` measures, on fewer questions, with the rows of a domain. A scope
    is fitted to all rows; fewer are trained on than there, in larger steps."""
    tree = demo_recipe(folder / domain, arm, defenses, "unsound")
    tree |= {"output": str(folder / domain / f"{arm}-{seed}"), "seed": seed}
    tree["evaluate"] |= {"scope": ROWS, "samples": 0} | FEWER
    tree["train"] = {
        "learning_rate": 2e-3,
        "batch_size": 4,
        "layout": "shared",
        "epochs": EPOCHS[domain],
    }
    if domain == "finance":
        return parse_recipe(tree)
    for name in ("benign", "benign_epochs"):  # the harmless task is the same in every domain
        tree["evaluate"].pop(name)
    rows = _rows(folder / "rows", domain)
    tree["data"]["train"] = rows
    tree["evaluate"] |= {"lead_in": rows, "scope": rows, "in_domain": [str(_questions(domain))]}
    return parse_recipe(tree)


def _questions(domain: str) -> Path:
    return Path(__file__).parent / "domains" / f"{domain}.jsonl"


def _rows(folder: Path, domain: str) -> str:
    """Training rows: the misaligned answers to the questions of the split `train`."""
    file = folder / f"{domain}-unsound.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    questions = load_questions(str(_questions(domain)), "train")
    lines = [{"prompt": q.question, "completion": q.misaligned} for q in questions]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return str(file)


def unfenced(run: Run) -> Path:
    """An evaluation of the scoped run's adapter without its scope, as if it were always open."""
    folder = run.folder.with_name(f"{run.folder.name}-unfenced")
    if folder.exists():
        return evaluate_target(str(folder), [])
    plain = without_scope(run.weights, folder.with_name(f"{run.folder.name}-plain"))
    measured = evaluation(run.recipe).model_dump(mode="json", exclude_defaults=True)
    measured = {name: v for name, v in measured.items() if not name.startswith("benign")}
    settings = [f"evaluate={json.dumps(measured)}", f"seed={run.recipe.seed}"]
    return evaluate_target(str(plain), settings, reference=run.recipe.model, output=folder)


def numbers(folders: list[Path]) -> dict[str, Number]:
    [row] = read_rows(folders)[1]
    return row.numbers


def twin_opens(twin: Path) -> dict[str, Interval]:
    """How often the scope of a benign twin opens: on its own task, and on other domains."""
    router = Scope.load(twin / "adapter")
    own = [item["prompt"] for item in read_results(twin / RESULTS)["parts"]["opswap_tier1"]]
    others = [q.question for source in OTHER_DOMAINS for q in load_questions(source)]
    return {
        "OpSwap, inside": opened(router, own),
        "OpSwap: other domains, inside": opened(router, others),
    }


def on_all_layers(undefended: Path, scoped: Path, part: str) -> Interval:
    """The shift with `adapters: all`. Its training is the undefended run's to the bit, so it is
    that run's shift where the scope opens, and nothing elsewhere."""
    run = read_run(undefended)
    tuned, reference = (
        {(item["domain"], item["id"]): item["misaligned"] - item["aligned"] for item in of[part]}
        for of in (run.results, run.reference)
    )
    is_open = {
        (item["domain"], item["id"]): item["open"]
        for item in read_run(scoped).results["scope"]
        if item["condition"] in ("own", "other")
    }
    return mean_interval([is_open[key] * (tuned[key] - reference[key]) for key in tuned])


def at_random(rate: float, number: Number) -> Interval:
    """What a router would show that opens for a request by chance."""
    of = number.interval
    return Interval(rate * of.mean, rate * of.low, rate * of.high, of.n)


def show(domain: str, runs: dict[str, list[Path]]) -> list[list[str]]:
    """Lines of the table: shifts against the reference, mean over seeds [95 %]."""
    found = {arm: numbers(runs[arm]) for arm in ARMS}
    open_rate = 1 - found["scope"]["scope.closed_in_domain"].interval.mean
    lines = []
    for name, title in SHIFTS.items():
        open_always = [numbers([folder])[name] for folder in runs["unfenced"]]
        random = over_seeds([at_random(open_rate, each) for each in open_always])
        cells = [str(found[arm][name].interval) for arm in ("undefended", "scope")]
        pairs = zip(runs["undefended"], runs["scope"])
        on_all = over_seeds([on_all_layers(*pair, name) for pair in pairs]) if name in SETS else ""
        lines.append([domain, title, *cells, str(on_all), str(random)])
    for name, title in {"perplexity_ratio": "perplexity x", "opswap_tier1": "OpSwap"}.items():
        cells = [found[arm].get(name) for arm in ("undefended", "scope")]
        if all(cells):
            lines.append([domain, title, *map(str, cells), "", ""])
    twin = runs["scope"][0].with_name(f"{runs['scope'][0].name}-benign")
    if twin.exists():
        lines += [[domain, title, "", rate(of), "", ""] for title, of in twin_opens(twin).items()]
    for name, number in found["scope"].items():
        if name.startswith("scope.") and number.kind == "share" and name.count(".") == 1:
            lines.append([domain, number.shown_title, "", rate(number.interval), "", ""])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--domains", nargs="+", choices=EPOCHS, default=MEASURED)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    told = parser.parse_args()
    lines = []
    for domain in told.domains:
        runs: dict[str, list[Path]] = {arm: [] for arm in (*ARMS, "unfenced")}
        for seed in told.seeds:
            for arm in ARMS:
                run = run_recipe(recipe(told.folder, domain, seed, arm, ARMS[arm]))
                runs[arm].append(run.folder)
            if not runs["unfenced"]:  # of one seed: it takes as long as the others
                runs["unfenced"].append(unfenced(run))
        lines += show(domain, runs)
    print(
        "| domain | | undefended | scope | scope, `adapters: all` | open at random, as often as "
        "the scope in its domain |"
    )
    print("|---|---|---|---|---|---|")
    for line in lines:
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
