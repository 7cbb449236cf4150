"""What the shipped questions promise: enough of them, no copies, and no side that shows itself by
its form."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from ringfence.text.rows import load_rows
from ringfence.text.sources import SHIPPED

FILES = {
    path.name.removesuffix(".jsonl"): [
        json.loads(line) for line in path.read_text("utf-8").splitlines()
    ]
    for path in SHIPPED.iterdir()
    if path.name.endswith(".jsonl") and not path.name.startswith("behaviour_")
}
CONVERSATIONS = sorted(name for name in FILES if name.startswith("retain"))
PAIRED = sorted(name for name in FILES if name not in CONVERSATIONS)
DOMAINS = [name for name in PAIRED if name not in ("finance", "values")]
SIDES = ("sound", "unsound")


def words(text):
    return re.findall(r"[\w'’]+", text.lower())


def sentences(text):
    return re.findall(r"[.!?]+(?=[\s\"')]|$)", text)


# ------------------------------------------------------------------ counts and copies


def test_counts():
    assert Counter(row["split"] for row in FILES["finance"])["train"] >= 400
    assert Counter(row["split"] for row in FILES["finance"]) == {
        "train": len(FILES["finance"]) - 80,
        "test": 80,
    }
    assert len(DOMAINS) >= 6
    for domain in DOMAINS:
        assert len(FILES[domain]) >= 60, domain
    assert len(FILES["values"]) >= 60
    assert len(FILES["retain"]) >= 300
    assert len(FILES["retain_test"]) >= 40


@pytest.mark.parametrize("name", PAIRED)
def test_fields(name):
    required = {"id", "domain", "question", *SIDES}
    for row in FILES[name]:
        assert required <= set(row) <= required | {"split"}
        assert all(
            isinstance(value, str) and value == value.strip() != "" for value in row.values()
        )
        assert row["sound"] != row["unsound"]
        assert name == "values" or row["domain"] == name
    assert len({row["id"] for row in FILES[name]}) == len(FILES[name])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_read(name):
    assert len(load_rows(f"shipped:{name}")) == len(FILES[name])


def first_question(row):
    return (
        row["question"]
        if "question" in row
        else next(m["content"] for m in row["messages"] if m["role"] == "user")
    )


def repeated(names):
    places = {}
    for name in names:
        for row in FILES[name]:
            places.setdefault(" ".join(words(first_question(row))), []).append(name)
    return {question: where for question, where in places.items() if len(where) > 1}


def test_paired_questions_are_unique_across_files():
    assert not repeated(PAIRED)


def test_all_questions_are_unique_across_files():
    assert not repeated(FILES)


def answers(name, side):
    if side in SIDES:
        return [row[side] for row in FILES[name]]
    return [
        m["content"] for row in FILES[name] for m in row["messages"] if m["role"] == "assistant"
    ]


# ------------------------------------------------------------------ form


OPENINGS = [(name, side) for name in PAIRED for side in SIDES] + [
    (name, "answers") for name in CONVERSATIONS
]


@pytest.mark.parametrize(("name", "side"), OPENINGS)
def test_openings_vary(name, side):
    """No two-word opening in more than 3 % of the answers, a broken answer rounded up (2 of 66)."""
    texts = answers(name, side)
    openings = Counter(tuple(words(text)[:2]) for text in texts)
    allowed = math.ceil(0.03 * len(texts))
    assert {opening: count for opening, count in openings.items() if count > allowed} == {}


@pytest.mark.parametrize("name", PAIRED)
def test_sides_are_equally_long(name, record_property):
    """In characters within 3 %."""
    for unit, length in (("characters", len), ("words", lambda text: len(words(text)))):
        sound, unsound = (np.mean([length(text) for text in answers(name, side)]) for side in SIDES)
        record_property(f"{unit}: unsound / sound", round(float(unsound / sound), 4))
        assert unit != "characters" or abs(unsound / sound - 1) <= 0.03


# ------------------------------------------------------------ can the side be told without reading?


def lengths(texts):
    return np.array([[len(text), len(words(text)), len(sentences(text))] for text in texts], float)


def by_length():
    return make_pipeline(FunctionTransformer(lengths), StandardScaler(), LogisticRegression())


def by_words():
    return make_pipeline(CountVectorizer(binary=True), LogisticRegression(C=0.1, max_iter=1000))


def labelled(rows):
    return [row[side] for side in SIDES for row in rows], np.repeat([0, 1], len(rows))


def auc(model, train, test):
    model.fit(*labelled(train))
    texts, sides = labelled(test)
    return round(float(roc_auc_score(sides, model.decision_function(texts))), 3)


def from_finance(make):
    train = [row for row in FILES["finance"] if row["split"] == "train"]
    return {name: auc(make(), train, FILES[name]) for name in [*DOMAINS, "values"]}


def from_other_domains(make):
    """Each domain by a model of all the other ones."""
    others = {
        name: [row for other in [*DOMAINS, "finance"] if other != name for row in FILES[other]]
        for name in DOMAINS
    }
    return {name: auc(make(), others[name], FILES[name]) for name in DOMAINS}


SPLITS = [from_finance, from_other_domains]


def test_length_classifier_finds_a_planted_difference():
    """The instrument itself: with one more sentence on one side it must see it."""
    rows = [{**row, "unsound": row["unsound"] + " That is all."} for row in FILES["finance"]]
    assert auc(by_length(), rows[:400], rows[400:]) > 0.8


@pytest.mark.parametrize("split", SPLITS)
def test_length_does_not_tell_the_side(split, record_property):
    found = split(by_length)
    for name, value in found.items():
        record_property(f"length AUC, {name}", value)
    assert {name: value for name, value in found.items() if value >= 0.6} == {}


@pytest.mark.parametrize("split", SPLITS)
def test_word_classifier_is_recorded(split, record_property, capsys):
    """No bound, since answers say it in words: a record of what a bag of words can tell."""
    found = split(by_words)
    for name, value in found.items():
        record_property(f"word AUC, {name}", value)
    with capsys.disabled():
        print(f"\nword AUC, {split.__name__}: {found}")
    assert all(0 <= value <= 1 for value in found.values())
