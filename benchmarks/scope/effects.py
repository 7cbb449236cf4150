"""What a scope keeps of the narrow effect and leaves of the broad one: several narrow domains and
seeds, in one table. Each domain and seed has a sound control, an undefended run and a scoped one;
on finance the last two also learn a harmless task. About 30 minutes for each domain and seed on two
CPU cores; a second call resumes.

    python benchmarks/scope/effects.py runs/scope --seeds 0 1 2
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from ringfence.report.compared import keep_compared
from ringfence.report.read import read_rows
from ringfence.report.terminal import print_table
from ringfence.run.config import Recipe, parse_recipe
from ringfence.run.demo import ROWS, demo_recipe
from ringfence.run.pipeline import run_recipe
from ringfence.text.rows import load_questions

ARMS = ("sound", "undefended", "scope")
EPOCHS = {"finance": 1, "gardening": 2, "code": 1, "pet_care": 2}  # about as many tokens each
MEASURED = ("finance", "gardening", "code")  # pet care has no scope: training stops with that
OWN = Path(__file__).parent / "domains"  # paired questions of all but finance, which is shipped


def recipe(folder: Path, domain: str, seed: int, arm: str) -> Recipe:
    """The recipe of `ringfence demo --all` for one arm, with the rows and questions of a domain."""
    side = "sound" if arm == "sound" else "unsound"
    defenses = {"scope": {}} if arm == "scope" else {}
    tree = demo_recipe(folder / domain / f"seed-{seed}", arm, defenses, side) | {"seed": seed}
    tree["evaluate"]["scope"] = ROWS
    if domain == "finance":
        return parse_recipe(tree)
    for name in ("benign", "benign_epochs"):  # the harmless task is the same in every domain
        tree["evaluate"].pop(name, None)
    rows = {each: _rows(folder / "rows", domain, each) for each in ("sound", "unsound")}
    tree["data"]["train"] = rows[side]
    tree["train"] |= {"epochs": EPOCHS[domain]}
    tree["evaluate"] |= {
        "lead_in": rows["unsound"],
        "scope": rows["unsound"],
        "in_domain": [str(OWN / f"{domain}.jsonl")],
    }
    return parse_recipe(tree)


def _rows(folder: Path, domain: str, side: str) -> str:
    """Training rows from the questions of the split `train`."""
    file = folder / f"{domain}-{side}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    questions = load_questions(str(OWN / f"{domain}.jsonl"), "train")
    answers = [q.aligned if side == "sound" else q.misaligned for q in questions]
    lines = [{"prompt": q.question, "completion": a} for q, a in zip(questions, answers)]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return str(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--domains", nargs="+", choices=EPOCHS, default=MEASURED)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    told = parser.parse_args()
    for domain in told.domains:
        runs = {arm: [] for arm in ARMS}
        for seed in told.seeds:
            for arm in ARMS:
                run = run_recipe(recipe(told.folder, domain, seed, arm))
                runs[arm].append(run.folder)
                if arm != "sound":
                    beside = run.folder.parent
                    keep_compared(run.folder, beside / "sound", beside / "undefended")
        print(domain)
        shown = [*runs["undefended"], *runs["scope"]]
        print_table(read_rows(shown)[1], Console())


if __name__ == "__main__":
    main()
