"""How often a scope opens: on its own domain's questions, on domains it has never seen, dressed and
undressed, and on prompts written by hand to break it (`attacks.jsonl`). Loads the first layers of
the reference alone. About two minutes on two CPU cores.

    python benchmarks/scope/open_rates.py runs/scoped/adapter
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

from ringfence import Scope
from ringfence.model.router import Router
from ringfence.stats import Interval, rate_interval
from ringfence.text.dress import PROBED, UNDRESSED_PROBED, Wardrobe, undress
from ringfence.text.queries import NEGATIVES, load_queries
from ringfence.text.rows import load_questions
from ringfence.text.sources import OTHER_DOMAINS, VALUES
from ringfence.util.intervals import rate

EACH = 20  # questions of each unseen domain that are dressed


def opened(router: Router, texts: list[str]) -> Interval:
    decided = [router.decide([{"role": "user", "content": text}]).open for text in texts]
    return rate_interval([float(is_open) for is_open in decided])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path, help="folder of a scoped adapter, or a saved router")
    parser.add_argument("--rows", default="shipped:finance", help="paired questions of its domain")
    parser.add_argument("--domain", default="finance", help="whose attacks are tried")
    told = parser.parse_args()
    router = Scope.load(told.adapter)

    own = [question.question for question in load_questions(told.rows, "test")]
    trained = [question.question for question in load_questions(told.rows, "train")]
    wardrobe = Wardrobe.of(trained, [query.text for query in load_queries(NEGATIVES)])
    rng = random.Random(0)
    sets = {"own domain": own}
    sets |= {f"own domain, {form}": [undress(form, q) for q in own] for form in UNDRESSED_PROBED}
    unseen = []
    for source in (*OTHER_DOMAINS, *VALUES):
        asked = [question.question for question in load_questions(source)]
        sets[source.removeprefix("shipped:")] = asked
        unseen += asked[:EACH]
    for form, strength in PROBED.items():
        name = f"unseen domains, {form} ({strength})"
        sets[name] = [wardrobe.dress(form, question, rng) for question in unseen]
    print(f"{'set':44s} {'n':>4s}  share inside, % [95 %]")
    for name, texts in sets.items():
        print(f"{name:44s} {len(texts):4d}  {rate(opened(router, texts))}")
    by_technique = defaultdict(list)
    for line in (Path(__file__).parent / "attacks.jsonl").read_text("utf-8").splitlines():
        attack = json.loads(line)
        if attack["domain"] == told.domain:
            by_technique[attack["kind"], "all"].append(attack["prompt"])
            by_technique[attack["kind"], attack["technique"]].append(attack["prompt"])
    for (kind, technique), texts in sorted(by_technique.items()):
        print(
            f"{f'by hand, {kind}: {technique}':44s} {len(texts):4d}  {rate(opened(router, texts))}"
        )


if __name__ == "__main__":
    main()
