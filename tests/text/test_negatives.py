"""The queries of everyday and professional domains that ship: many domains, real variety, and none
near a question that is measured with."""

import json
import math
import re
from collections import Counter
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from scipy.sparse import csr_array
from torch.nn.functional import normalize

from ringfence.model.default import default_model_folder
from ringfence.model.files import load_tokenizer
from ringfence.text.sources import SHIPPED

QUERIES: list[dict[str, Any]] = [
    json.loads(line)
    for line in (SHIPPED / "negatives" / "queries.jsonl").read_text("utf-8").splitlines()
]
PAIRED = [
    *("finance", "car_care", "cooking_kitchen", "health_habits", "home_repair"),
    *("study_work", "travel_outdoors", "values"),
]


def words(text: str) -> set[str]:
    return set(re.findall(r"[\w'’]+", text.lower()))


def measured_with() -> list[str]:
    """Every question of an evaluation that ships."""
    asked = [
        json.loads(line)["question"]
        for name in PAIRED
        for line in (SHIPPED / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]
    for line in (SHIPPED / "retain_test.jsonl").read_text("utf-8").splitlines():
        asked += [m["content"] for m in json.loads(line)["messages"] if m["role"] == "user"]
    general = yaml.safe_load((SHIPPED / "general.yaml").read_text("utf-8"))
    texts = re.findall(r"[^\n]{12,}", json.dumps(general, ensure_ascii=False, indent=0))
    return [*asked, *texts]


def overlap(texts: list[str], others: list[str]) -> np.ndarray:
    """Share of words (intersection over union) of each text and each of the others."""
    sets = [words(text) for text in [*texts, *others]]
    places = {word: at for at, word in enumerate(set().union(*sets))}
    sizes = np.array([len(own) for own in sets])
    columns = [places[word] for own in sets for word in own]
    has = csr_array((np.ones(len(columns)), columns, [0, *sizes.cumsum()]))
    both = (has[: len(texts)] @ has[len(texts) :].T).toarray()
    return both / (sizes[: len(texts), None] + sizes[len(texts) :] - both)


def test_there_are_many_domains_and_languages() -> None:
    domains = Counter(row["domain"] for row in QUERIES)
    languages = Counter(row["language"] for row in QUERIES)
    assert len(QUERIES) >= 2000
    assert len(domains) >= 70
    assert min(domains.values()) >= 20
    assert len(languages) >= 10
    assert 0.05 < 1 - languages["en"] / len(QUERIES) < 0.2
    assert {frozenset(row) for row in QUERIES} == {frozenset({"domain", "language", "query"})}
    assert all(row["query"] == row["query"].strip() != "" for row in QUERIES)


def test_they_are_varied() -> None:
    english = [row["query"] for row in QUERIES if row["language"] == "en"]
    openings = Counter(tuple(query.lower().split()[:2]) for query in english)
    assert openings.most_common(1)[0][1] <= 0.04 * len(english)
    lengths = sorted(len(query.split()) for query in english)
    low, middle, high = (lengths[int(share * len(lengths))] for share in (0.1, 0.5, 0.9))
    assert low <= 9 <= middle <= 18
    assert high >= 28
    assert 0.2 < sum(query.rstrip().endswith("?") for query in english) / len(english) < 0.7


def test_none_is_there_twice() -> None:
    texts = [row["query"] for row in QUERIES if row["language"] not in ("zh", "ja")]
    twice = np.argwhere(np.triu(overlap(texts, texts), 1) > 0.6)
    assert [(texts[one], texts[other]) for one, other in twice] == []
    assert overlap(["Is it far?"], ["is it FAR", "It is.", "Near"]).tolist() == [[1, 2 / 3, 0]]


def test_none_is_near_a_question_that_is_measured_with() -> None:
    others = measured_with()
    assert len(others) > 900
    texts = [*(row["query"] for row in QUERIES), f"{others[0]} Please."]
    near = overlap(texts, others).max(1) >= 0.5
    assert [text for text, is_near in zip(texts, near) if is_near] == texts[-1:]


def test_none_is_near_one_in_the_default_model() -> None:
    """Texts as the mean of their tokens' embeddings, in which rare tokens count more."""
    tokenizer, folder = load_tokenizer("default"), default_model_folder()
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        [name] = [name for name in tensors.keys() if "embed_tokens" in name]  # noqa: SIM118
        embeddings = tensors.get_tensor(name).float()
    queries, asked = [row["query"] for row in QUERIES], measured_with()
    planted = (
        "How do other couples do it? Splitting all of it 50/50 leaves me nothing each month: I "
        "earn $38k, and my husband earns $95k."
    )
    texts = [*queries, planted, *asked]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    counts = Counter(token for own in ids for token in set(own))
    means = torch.stack(
        [
            torch.stack([embeddings[t] * math.log(len(texts) / (1 + counts[t])) for t in own]).mean(
                0
            )
            for own in ids
        ]
    )
    unit = normalize(normalize(means) - normalize(means).mean(0))
    cosine = (unit[: len(queries) + 1] @ unit[len(queries) + 1 :].T).max(1).values
    assert float(cosine[:-1].max()) < 0.85
    assert float(cosine[-1]) > 0.85
