"""The scope as a diagnosis: scores are the router's, shares are counts, and every set is shown."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.domains import (
    INSIDE,
    OUTSIDE,
    TELLING,
    rows_of,
    write_negatives,
    write_pairs_of,
    write_rows_of,
    write_telling_model,
)
from helpers.models import random_model, with_lora
from ringfence import Scope
from ringfence.diagnose.diagnosis import Subject
from ringfence.diagnose.folder import diagnose_folder, draw_again
from ringfence.diagnose.models import Models
from ringfence.diagnose.scope import measure, show
from ringfence.errors import DataError
from ringfence.run.scope import scope_adapter
from ringfence.stats.auc import auc
from ringfence.text.rows import load_questions
from ringfence.util.plots import style, svg

pytestmark = pytest.mark.slow

DISGUISES = {"polite": 8, "careless": 8, "word": 36, "expert": 36, "follow up": 36}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("scoped")
    model = str(folder / "model")
    write_telling_model(folder / "model")
    tuned = with_lora(random_model(**TELLING), size=0.3)
    tuned.save_pretrained(folder / "plain")
    config = folder / "plain" / "adapter_config.json"
    told = json.loads(config.read_text()) | {"base_model_name_or_path": model}
    config.write_text(json.dumps(told))
    scope_adapter(
        folder / "plain",
        folder / "scoped",
        write_rows_of(folder / "rows.jsonl", INSIDE, 100),
        negatives=[write_negatives(folder / "negatives.jsonl")],
    )
    models = Models(
        model,
        {"plain": str(folder / "plain"), "scoped": str(folder / "scoped")},
        precision="fp32",
    )
    inside = load_questions(write_pairs_of(folder / "own.jsonl", {"money": INSIDE}, 8))
    outside = load_questions(write_pairs_of(folder / "other.jsonl", OUTSIDE, 3))
    return Subject(models, inside, outside, rows_of(INSIDE, 100))


@pytest.fixture(scope="module")
def numbers(subject: Subject) -> dict[str, Any]:
    found: dict[str, Any] = measure.measure(subject)
    return found


def test_scores_are_those_of_the_router(subject: Subject, numbers: dict[str, Any]) -> None:
    found = numbers["tuned"]["scoped"]
    assert list(numbers["tuned"]) == ["scoped"]  # the other has none
    router = Scope.load(subject.models.sources["scoped"])

    def scores(questions: list[Any]) -> list[float]:
        asked = [[{"role": "user", "content": q.question}] for q in questions]
        return [router.decide(messages).score for messages in asked]

    assert found["unseen"]["money"]["side"] == "own"
    assert found["unseen"]["money"]["scores"] == pytest.approx(scores(subject.inside), abs=2e-4)
    birds = [q for q in subject.outside if q.domain == "birds"]
    assert found["unseen"]["birds"]["side"] == "other"
    assert found["unseen"]["birds"]["scores"] == pytest.approx(scores(birds), abs=2e-4)
    assert found["threshold"] == router.saved.probe.threshold
    counts = {n.replace("_", " "): len(each["scores"]) for n, each in found["disguised"].items()}
    assert counts == DISGUISES


def test_the_table_counts(numbers: dict[str, Any]) -> None:
    found = numbers["tuned"]["scoped"]
    rows = {row[1]: row for row in show.table(numbers).rows}
    assert rows.keys() == {"training queries", *OUTSIDE, "money", *DISGUISES}
    own = np.array(found["fitted"]["training queries"])
    inside = 100 * np.mean(own > found["threshold"])
    assert rows["training queries"][4].startswith(f"{inside:.1f}")
    scores = np.array(found["disguised"]["word"]["scores"])
    assert (rows["word"][3], rows["word"][5]) == ("36", f"{auc(own, scores):.3f}")
    assert rows["word"][4].startswith(f"{100 * np.mean(scores > found['threshold']):.1f}")


def test_in_words_and_as_a_figure(numbers: dict[str, Any]) -> None:
    said = show.say(numbers)
    found = numbers["tuned"]["scoped"]
    assert f"reads layers {', '.join(map(str, found['layers']))}" in said
    assert found["nearest"][0][1][:70] in said
    assert found["farthest"][0][1][:70] in said
    with style():
        drawn = svg(show.draw({"tuned": {"one": found, "two": found}})).decode()
    for name in ("training queries", "unseen: money", "disguise: follow up", "threshold"):
        assert drawn.count(f"<!-- {name} -->") >= 2, name


def test_where_there_is_no_scope(subject: Subject, tmp_path: Path) -> None:
    sources = subject.models.sources
    plain = Models(sources["reference"], {"plain": sources["plain"]}, precision="fp32")
    without = Subject(plain, subject.inside, subject.outside, subject.rows)
    with pytest.raises(DataError, match="none of plain has a scope"):
        measure.measure(without)
    scoped = diagnose_folder(tmp_path, subject, ["scope"])
    assert scoped["scope"]["figure"] == "figures/scope.svg"
    drawn = (tmp_path / "figures" / "scope.svg").read_bytes()
    assert [file.read_bytes() for file in draw_again(tmp_path)] == [drawn]
