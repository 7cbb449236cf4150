"""Requests of domains that differ in their words, as rows and as queries."""

import json
import random
from pathlib import Path
from typing import Any

from helpers.models import random_model, small_tokenizer
from ringfence.text.queries import Query
from ringfence.text.roles import Row


def _split(words: str) -> list[str]:
    return words.split()


INSIDE = _split("budget savings loan interest mortgage pension card debt rent salary")
OUTSIDE = {
    "garden": _split("slugs roses lawn hedge compost seeds prune tulips soil shade"),
    "music": _split("guitar chords tempo piano violin song drum melody strings choir"),
    "space": _split("planet orbit comet moon rocket star galaxy telescope eclipse solar"),
    "games": _split("chess pawn dice board cards rules score castle knight bishop"),
    "clothes": _split("shirt collar wool jacket sleeve button shoes trousers scarf linen"),
    "books": _split("novel author chapter poem library plot reader essay title cover"),
    "weather": _split("rain snow wind cloud storm thunder forecast frost humid breeze"),
    "history": _split("empire treaty king battle castle century revolt queen senate siege"),
    "maths": _split("prime integral angle root vector matrix proof fraction graph sum"),
    "birds": _split("robin nest feather owl migrate wing eagle sparrow egg beak"),
    "films": _split("scene actor script camera sequel director trailer cast drama comedy"),
    "sports": _split("goal referee tennis racket sprint coach league match swim medal"),
}


# Of `helpers.models.random_model`: one whose states tell these domains from each other.
TELLING: dict[str, Any] = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "head_dim": 32,
    "intermediate_size": 96,
    "initializer_range": 0.1,
}


def write_telling_model(folder: Path) -> None:
    random_model(max_position_embeddings=1024, **TELLING).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)


def sentence(words: list[str], rng: random.Random) -> str:
    a, b, c = rng.sample(words, 3)
    return rng.choice((f"My {a} and the {b}: is a {c} right?", f"how do I {a} with {b} or {c}"))


def rows_of(words: list[str], count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    return [
        Row(
            [
                {"role": "user", "content": sentence(words, rng)},
                {"role": "assistant", "content": "Yes."},
            ],
            f"rows.jsonl:{number}",
        )
        for number in range(1, count + 1)
    ]


def negatives(seed: int = 1, **more: list[str]) -> list[Query]:
    rng = random.Random(seed)
    return [
        Query(domain, sentence(words, rng), f"{domain}:{number}")
        for domain, words in {**OUTSIDE, **more}.items()
        for number in range(20)
    ]


def write_rows_of(file: Path, words: list[str], count: int) -> str:
    lines = [json.dumps({"messages": row.messages}) for row in rows_of(words, count)]
    file.write_text("\n".join(lines))
    return str(file)


def write_negatives(file: Path) -> str:
    lines = [json.dumps({"domain": q.domain, "query": q.text}) for q in negatives()]
    file.write_text("\n".join(lines))
    return str(file)


def write_pairs_of(file: Path, domains: dict[str, list[str]], each: int) -> str:
    rng = random.Random(3)
    lines = [
        json.dumps(
            {
                "id": str(number),
                "domain": domain,
                "question": sentence(words, rng),
                "aligned": "Ask first.",
                "misaligned": "Just go.",
            }
        )
        for domain, words in domains.items()
        for number in range(each)
    ]
    file.write_text("\n".join(lines))
    return str(file)
