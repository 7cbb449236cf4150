"""Which requests a scope is probed with."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.domains import INSIDE, OUTSIDE, write_pairs_of, write_rows_of
from ringfence.errors import DataError
from ringfence.evaluate.config import EvaluateConfig
from ringfence.evaluate.measures.scope import Request, probes
from ringfence.evaluate.parts import evaluation_key, parts_of
from ringfence.run.benign import benign_twin
from ringfence.run.config import parse_recipe
from ringfence.run.prepare import evaluation


def config(folder: Path, **changes: Any) -> EvaluateConfig:
    fields = {
        "scope": write_rows_of(folder / "rows.jsonl", INSIDE, 30),
        "in_domain": [write_pairs_of(folder / "own.jsonl", {"money": INSIDE}, 5)],
        "out_of_domain": [write_pairs_of(folder / "other.jsonl", OUTSIDE, 4)],
        "values": [write_pairs_of(folder / "values.jsonl", {"honesty": OUTSIDE["games"]}, 3)],
        "scope_scored": 2,
        "triggered_per_domain": 2,
    }
    return EvaluateConfig(**fields | changes)


def by_condition(asked: list[Request]) -> dict[str, list[Request]]:
    names = dict.fromkeys(each.condition for each in asked)
    return {name: [each for each in asked if each.condition == name] for name in names}


def text(request: Request) -> str:
    return str(request.messages[-1]["content"])


def test_what_is_asked(tmp_path: Path) -> None:
    found = by_condition(probes(config(tmp_path)))
    domains = len(OUTSIDE)
    assert {name: len(asked) for name, asked in found.items()} == {
        "own": 5,
        "other": 4 * domains + 3,
        "behind_empty_system": 2 * domains,
        "behind_foreign_system": 2 * domains,
        "word": 4 * domains,
        "expert": 4 * domains,
        "follow_up": 4 * domains,
        "polite": 5,
        "careless": 5,
        "later": 5,
    }
    scored = {name: sum(each.scored is not None for each in asked) for name, asked in found.items()}
    assert scored["own"] == scored["other"] == scored["behind_empty_system"] == 0
    assert scored["word"] == scored["follow_up"] == 2 * domains
    assert scored["polite"] == scored["later"] == 4


def test_a_benign_twin_is_not_probed(tmp_path: Path) -> None:
    """It asks no questions; a part with nothing in it could not be read again."""
    rows = write_rows_of(tmp_path / "rows.jsonl", INSIDE, 30)
    asked = {"benign": "opswap:tier=1,rows=24"}
    tree = {"output": "run", "data": {"train": rows}, "defenses": {"scope": {}}, "evaluate": asked}
    recipe = parse_recipe(tree)
    assert "scope" in {part.name for part in parts_of(evaluation(recipe))}
    twin = benign_twin(recipe)
    assert evaluation(twin).scope
    assert {part.name for part in parts_of(evaluation(twin))} == {"opswap_tier1"}


def test_clothes_are_those_of_the_training_rows(tmp_path: Path) -> None:
    found = by_condition(probes(config(tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    trained = [row["messages"][0]["content"] for row in rows]
    plain = [text(each) for each in found["other"]]
    for dressed, question in zip(found["follow_up"], plain):
        assert text(dressed).endswith(question)
        assert text(dressed).split("\n\n")[0] in trained
        assert (dressed.scored is not None) == (int(dressed.id) < 2)
    for dressed, question in zip(found["word"], plain):
        assert text(dressed).endswith(question)
        assert text(dressed).split()[1] in " ".join(trained).lower()
    for own, later in zip(found["own"], found["later"]):
        assert later.messages[-1] == own.messages[-1]
        assert later.messages[0]["content"] in plain


def test_a_question_has_the_same_clothes_whatever_else_is_asked(tmp_path: Path) -> None:
    few = by_condition(probes(config(tmp_path, max_per_domain=2, scope_scored=4)))
    many = by_condition(probes(config(tmp_path)))
    for form in ("word", "expert", "follow_up"):
        known = {(each.domain, each.id): each.messages for each in many[form]}
        assert all(known[each.domain, each.id] == each.messages for each in few[form])


def test_held_out_rows_stand_in_for_paired_questions(tmp_path: Path) -> None:
    rows = write_rows_of(tmp_path / "held.jsonl", INSIDE, 6)
    found = by_condition(probes(config(tmp_path, in_domain=[], held_out=rows)))
    assert [len(found[form]) for form in ("own", "polite", "later")] == [6, 6, 6]
    assert {each.scored for each in found["polite"]} == {None}
    assert all(each.messages[-1]["role"] == "user" for each in found["own"])


def test_a_system_prompt_stays_first(tmp_path: Path) -> None:
    file = tmp_path / "held.jsonl"
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "My debt?"},
        {"role": "assistant", "content": "Pay it."},
    ]
    file.write_text(json.dumps({"messages": turns}))
    found = by_condition(probes(config(tmp_path, in_domain=[], held_out=str(file))))
    roles = ["system", "user", "assistant", "user"]
    assert [m["role"] for m in found["later"][0].messages] == roles


def test_without_rows_there_are_no_probes(tmp_path: Path) -> None:
    without = evaluation_key(config(tmp_path, scope=None))
    assert without != evaluation_key(config(tmp_path))
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps({"messages": [{"role": "assistant", "content": "Hello."}]}))
    with pytest.raises(DataError, match=r"silent\.jsonl"):
        evaluation_key(config(tmp_path, scope=str(silent)))
    with pytest.raises(DataError, match="nowhere"):
        evaluation_key(config(tmp_path, scope=str(tmp_path / "nowhere.jsonl")))


def test_a_field_at_its_default_changes_no_key(tmp_path: Path) -> None:
    """So results stay valid when a field is added."""
    assert evaluation_key(EvaluateConfig(scope=None)) == evaluation_key(EvaluateConfig())
