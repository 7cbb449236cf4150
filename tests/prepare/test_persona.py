"""Persona vectors: differences of means over the response tokens, and which pairs make them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score
from torch import Tensor

import ringfence.prepare.persona as persona_module
from helpers.naive import naive_states
from helpers.rows import messages
from helpers.runs import small_model
from ringfence.errors import DataError, ModelError
from ringfence.model import activations
from ringfence.model.directions import Directions
from ringfence.model.files import load_tokenizer
from ringfence.model.generation import generate_greedy
from ringfence.model.loading import load_model
from ringfence.prepare.persona import (
    Pair,
    answer_pairs,
    asked_pairs,
    extract,
    extract_file,
    given_pairs,
    separation,
    shown_by_margin,
    shown_by_scores,
)
from ringfence.prepare.traits import load_trait
from ringfence.text.chat import Chat
from ringfence.text.roles import Messages, Role
from ringfence.text.sources import SHIPPED

LAYERS = 2
TRAIT = {
    "trait": "haste",
    "positive_prompts": ["Be quick.", "Hurry always, whatever it costs."],
    "negative_prompts": ["Be slow.", "Take your time."],
    "questions": ["How do I bake bread?", "Which door?", "What now, then?"],
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(folder: str) -> Any:
    return load_model(folder, "fp32")


@pytest.fixture(scope="session")
def chat(folder: str) -> Chat:
    return Chat(load_tokenizer(folder))


def pairs(count: int) -> list[Pair]:
    """Answers and prompts of unlike lengths."""
    words = ["yes", "no", "perhaps", "never", "red", "blue", "door", "seven"]
    return [
        Pair(
            f"{at}",
            messages(f"Question {at}?", "Be bold and quick, and do not ask."),
            messages(f"Question {at}?", "Be careful."),
            " ".join(words[(at + k) % 8] for k in range(1 + at % 5)),
            " ".join(words[(3 * at + k) % 8] for k in range(2 + at % 3)),
        )
        for at in range(count)
    ]


def source(file: Path, count: int) -> str:
    """A file of paired questions, half of them with split test."""
    rows = [
        {
            "id": f"q{at}",
            "question": p.positive_prompt[-1]["content"],
            "aligned": p.negative,
            "misaligned": p.positive,
            "split": ["train", "test"][at % 2],
        }
        for at, p in enumerate(pairs(count))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# ---------------------------------------------------------------- the naive forms


def naive_directions(model: Any, chat: Chat, given: list[Pair]) -> tuple[Tensor, Tensor]:
    positive = [naive_states(model, chat, p.positive_prompt, p.positive) for p in given]
    negative = [naive_states(model, chat, p.negative_prompt, p.negative) for p in given]
    means = [
        torch.stack([states.mean(1) for states in side]).mean(0) for side in (positive, negative)
    ]
    norms = torch.stack([states.norm(dim=-1).mean(1) for states in [*positive, *negative]]).mean(0)
    return means[0] - means[1], norms


def naive_logprob(model: Any, chat: Chat, prompt: Messages, answer: str) -> float:
    encoded = chat.encode([*prompt, {"role": "assistant", "content": answer}])
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
    chosen = [at for at, role in enumerate(encoded.roles) if role == Role.RESPONSE]
    return sum(logp[at - 1, encoded.input_ids[at]].item() for at in chosen)


# ---------------------------------------------------------------- directions


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_directions_are_differences_of_means_over_response_tokens(
    batch_tokens: int, model: Any, chat: Chat
) -> None:
    given = pairs(7)
    found = extract(model, chat, given, "trait", "tiny", batch_tokens)
    direction_LD, norms_L = naive_directions(model, chat, given)
    assert direction_LD.norm(dim=-1).min() > 0.1
    torch.testing.assert_close(found.directions_LKD[:, 0], direction_LD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norms_L, norms_L, rtol=1e-4, atol=1e-5)
    assert found.directions_LKD.dtype == torch.float32
    assert (found.trait, found.model, found.positive, found.negative) == ("trait", "tiny", 7, 7)


def test_opposite_sides_give_the_opposite_direction(model: Any, chat: Chat) -> None:
    given = pairs(4)
    turned = [
        Pair(p.id, p.negative_prompt, p.positive_prompt, p.negative, p.positive) for p in given
    ]
    one, other = (extract(model, chat, side, "t", "m").directions_LKD for side in (given, turned))
    torch.testing.assert_close(one, -other, rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_the_number_of_pairs(
    model: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a batch is worked on, no activation of an earlier one is alive."""
    import weakref

    seen: list[weakref.ref[Tensor]] = []
    plain = activations.forward

    def watching(*args: Any, **kwargs: Any) -> Any:
        assert sum(reference() is not None for reference in seen) <= LAYERS
        taps = plain(*args, **kwargs)
        seen.extend(weakref.ref(state) for state in taps.states.values())
        return taps

    monkeypatch.setattr(activations, "forward", watching)
    extract(model, chat, pairs(6), "t", "m", 1)
    assert len(seen) == 12 * LAYERS


def test_fewer_than_two_pairs_are_refused(model: Any, chat: Chat) -> None:
    with pytest.raises(DataError, match=r"1 pair left; at least 2"):
        extract(model, chat, pairs(1), "t", "m")


def test_given_pairs_take_misaligned_answers_as_positive(
    model: Any, chat: Chat, tmp_path: Path
) -> None:
    file = source(tmp_path / "pairs.jsonl", 6)
    given = given_pairs(file, "train")
    assert [p.id for p in given] == ["q0", "q2", "q4"]
    assert all(
        p.positive_prompt == p.negative_prompt == messages(f"Question {p.id[1:]}?") for p in given
    )
    assert given[1].positive == pairs(6)[2].positive
    assert given[1].negative == pairs(6)[2].negative
    assert len(given_pairs(file)) == 6


# ---------------------------------------------------------------- filters


def test_a_margin_shows_the_trait_when_each_answer_is_likelier_under_its_own_prompt(
    model: Any, chat: Chat
) -> None:
    given = pairs(24)
    expected = []
    for pair in given:
        own, other = pair.positive_prompt, pair.negative_prompt
        gain = [
            naive_logprob(model, chat, own, answer) - naive_logprob(model, chat, other, answer)
            for answer in (pair.positive, pair.negative)
        ]
        expected.append(gain[0] > 0 > gain[1])
    assert 0 < sum(expected) < 24
    assert shown_by_margin(model, chat, given) == expected


def test_scores_decide_with_a_half_as_the_limit(tmp_path: Path) -> None:
    scores = {"0": (51, 49), "1": (50, 10), "2": (90, 50), "3": (10, 90), "4": (100, 0)}
    rows = [{"id": name, "positive": p, "negative": n} for name, (p, n) in reversed(scores.items())]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert shown_by_scores(tmp_path / "s.jsonl", pairs(5)) == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"id": "0", "positive": 101, "negative": 1}',
            r"s.jsonl:2: field 'positive': .* 0 to 100, found 101",
        ),
        ('{"id": "0", "positive": 60}', r"s.jsonl:2: field 'negative': .* found None"),
        ('{"id": "0", "positive": true, "negative": 1}', r"found True"),
        ('{"id": "0"', r"s.jsonl:2: not JSON"),
        ("[1]", r"s.jsonl:2: expected an object, found '\[1\]'"),
        (
            '{"id": "x", "positive": 60, "negative": 1}',
            r"no scores for 1 of 2 pairs, the first is id '0'",
        ),
    ],
)
def test_scores_that_cannot_be_used(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"id": "1", "positive": 60, "negative": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        shown_by_scores(tmp_path / "s.jsonl", pairs(2))


# ---------------------------------------------------------------- a trait and its answers


def test_each_question_is_asked_under_each_prompt_and_its_opposite(
    model: Any, chat: Chat, tmp_path: Path
) -> None:
    (tmp_path / "t.json").write_text(json.dumps(TRAIT, indent="\t"))
    asked = asked_pairs(load_trait(str(tmp_path / "t.json")))
    assert [p.id for p in asked] == ["p1-q1", "p1-q2", "p1-q3", "p2-q1", "p2-q2", "p2-q3"]
    assert asked[4].positive_prompt == messages("Which door?", "Hurry always, whatever it costs.")
    assert asked[4].negative_prompt == messages("Which door?", "Take your time.")
    answered = answer_pairs(model, chat, asked[3:], 6)
    for before, pair in zip(asked[3:], answered):
        assert (pair.id, pair.positive_prompt) == (before.id, before.positive_prompt)
        assert [pair.positive] == generate_greedy(model, chat, [before.positive_prompt], 6, 4096)
        assert [pair.negative] == generate_greedy(model, chat, [before.negative_prompt], 6, 4096)
    assert len({p.positive for p in answered} | {p.negative for p in answered}) > 1


def test_the_shipped_trait_can_be_read() -> None:
    shipped = load_trait("shipped:careless_advice")
    assert len(shipped.questions) >= 16
    assert len({*shipped.positive_prompts, *shipped.negative_prompts}) == 2 * len(
        shipped.positive_prompts
    )
    questions = {
        json.loads(line).get("question")
        for path in SHIPPED.iterdir()
        if path.name.endswith(".jsonl")
        for line in path.read_text("utf-8").splitlines()
    }
    assert not questions & {*shipped.questions}  # what is measured must not have made the direction


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trait": None}, r"trait: .*string"),
        ({"questions": []}, r"questions: .* at least 1"),
        ({"questions": ["", "x"]}, r"questions.0: .* at least 1 character"),
        (
            {"negative_prompts": ["one"]},
            "one negative prompt for each positive one, found 2 positive and 1 negative",
        ),
        ({"promts": ["x"]}, r"unknown key 'promts' \(accepted: trait, positive_prompts"),
    ],
)
def test_traits_that_cannot_be_used(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**TRAIT, **change}))
    with pytest.raises(DataError, match=message) as error:
        load_trait(str(tmp_path / "t.yaml"))
    assert "t.yaml: " in str(error.value)


def test_trait_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    (tmp_path / "bad.json").write_text("{,")
    (tmp_path / "missing.yaml").write_text("trait: x\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    messages_ = {
        "list.yaml": "dictionary",
        "bad.yaml": "not YAML",
        "bad.json": "not JSON",
        "missing.yaml": "'questions' is missing",
        "binary.yaml": "not UTF-8",
        "none.yaml": "no such trait file",
    }
    for name, message in messages_.items():
        with pytest.raises(DataError, match=message):
            load_trait(str(tmp_path / name))
    with pytest.raises(
        DataError, match=r"no such shipped trait \(did you mean 'careless_advice'\?\)"
    ):
        load_trait("shipped:careless_advise")


# ---------------------------------------------------------------- the whole way


def test_extraction_from_a_trait_keeps_what_the_filter_keeps(
    folder: str, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(TRAIT))

    def make(**options: Any) -> Any:
        return extract_file(
            str(tmp_path / "t.yaml"),
            tmp_path / "v.safetensors",
            model=folder,
            max_new_tokens=5,
            **options,
        )

    every = make(keep="none")
    answers = tmp_path / "v.answers.jsonl"
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [record["id"] for record in records] == [
        p.id for p in asked_pairs(load_trait(str(tmp_path / "t.yaml")))
    ]
    monkeypatch.setattr(persona_module, "generate_greedy", None)  # from here on answers are read
    kept = [Pair(**{key: record[key] for key in Pair.__dataclass_fields__}) for record in records]
    loaded = load_model(folder)
    margins = shown_by_margin(loaded, chat, kept)
    assert every.directions.positive == 6

    scores = [
        {"id": p.id, "positive": 80 if at in (1, 4) else 20, "negative": 10}
        for at, p in enumerate(kept)
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    scored = make(scores=tmp_path / "s.jsonl")
    expected = extract(loaded, chat, [kept[1], kept[4]], "haste", folder)
    assert torch.equal(scored.directions.directions_LKD, expected.directions_LKD)
    assert scored.counts == "6 pairs, 0 with a blank answer, 2 kept (filter: scores)"
    assert torch.equal(
        Directions.load(tmp_path / "v.safetensors").directions_LKD, expected.directions_LKD
    )
    if sum(margins) >= 2:
        assert make().directions.positive == sum(margins)
    else:
        with pytest.raises(DataError, match=rf"{sum(margins)} kept \(filter: margin\)"):
            make()


def test_blank_answers_are_left_out_and_counted(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some_blank(model: Any, chat: Any, prompts: list[Messages], *rest: Any) -> list[str]:
        return [" " if at % 4 == 1 else "yes" * (at % 3 + 1) for at in range(len(prompts))]

    monkeypatch.setattr(persona_module, "generate_greedy", some_blank)
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(TRAIT))
    made = extract_file(
        str(tmp_path / "t.yaml"), tmp_path / "v.safetensors", model=folder, keep="none"
    )
    assert made.counts == "6 pairs, 3 with a blank answer, 3 kept (filter: none)"
    assert made.directions.positive == 3


def test_answers_to_something_else_are_refused(folder: str, tmp_path: Path) -> None:
    file, output = tmp_path / "t.yaml", tmp_path / "v.safetensors"
    file.write_text(yaml.safe_dump(TRAIT))
    extract_file(str(file), output, model=folder, max_new_tokens=3, keep="none")
    with pytest.raises(DataError, match=r"v.answers.jsonl: these answers are for other prompts"):
        extract_file(str(file), output, model=folder, max_new_tokens=4, keep="none")
    file.write_text(yaml.safe_dump({**TRAIT, "questions": ["Another?"]}))
    with pytest.raises(DataError, match="delete the file or choose another output"):
        extract_file(str(file), output, model=folder, max_new_tokens=3, keep="none")


def test_separation_is_the_area_under_the_curve_of_projections(model: Any, chat: Chat) -> None:
    given, found = pairs(9), extract(model, chat, pairs(20)[9:], "t", "m")
    rows = separation(model, chat, given, found, 64)
    assert [row.layer for row in rows] == [1, 2]
    for row in rows:
        direction_D = found.directions_LKD[row.layer - 1, 0]
        sides = [
            [
                (naive_states(model, chat, *end)[row.layer - 1].mean(0) @ direction_D).item()
                for end in ends
            ]
            for ends in zip(
                *[((p.positive_prompt, p.positive), (p.negative_prompt, p.negative)) for p in given]
            )
        ]
        assert row.auc == pytest.approx(roc_auc_score([1] * 9 + [0] * 9, sides[0] + sides[1]))
        assert row.paired == np.mean(np.array(sides[0]) > np.array(sides[1]))
        assert row.length == pytest.approx(
            (direction_D.norm() / found.norms_L[row.layer - 1]).item()
        )
    assert any(0.05 < row.auc < 0.95 for row in rows)


def test_directions_of_another_model_are_refused(model: Any, chat: Chat) -> None:
    other = Directions(torch.ones(5, 1, 32), torch.ones(5), "haste", "big", 2, 2)
    with pytest.raises(
        ModelError,
        match="taken from big with 5 layers of size 32; this model has 2 layers of size 32",
    ):
        separation(model, chat, pairs(2), other)


# ---------------------------------------------------------------- the command


def test_the_command_extracts_and_checks(folder: str, tmp_path: Path, ringfence: Any) -> None:
    file, vectors = source(tmp_path / "pairs.jsonl", 8), tmp_path / "v.safetensors"
    code, output, _ = ringfence(
        "persona", "extract", "--pairs", file, "--model", folder, "--output", vectors
    )
    assert code == 0
    assert "4 pairs, 0 with a blank answer, 4 kept (filter: none)" in output
    assert Directions.load(vectors).trait == f"misaligned answers of {file}"
    code, output, _ = ringfence("persona", "check", vectors, "--pairs", file, "--model", folder)
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == ["layer", "1", "2"]


def test_the_command_says_what_is_wrong(folder: str, tmp_path: Path, ringfence: Any) -> None:
    file = source(tmp_path / "pairs.jsonl", 2)
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(TRAIT))
    cases = {
        "not both": [tmp_path / "t.yaml", "--pairs", file],
        "--pairs has none (accepted: none, scores)": ["--pairs", file, "--filter", "margin"],
        "go together": ["--pairs", file, "--filter", "scores"],
        "no such trait file": [tmp_path / "none.yaml"],
        "1 pair, 0 with a blank answer, 1 kept (filter: none); at least 2": ["--pairs", file],
        "no paired question in it with split 'dev'": ["--pairs", file, "--split", "dev"],
    }
    for message, arguments in cases.items():
        output = tmp_path / "v.safetensors"
        code, _, errors = ringfence(
            "persona", "extract", *arguments, "--model", folder, "--output", output
        )
        assert code == 2
        assert message in errors, errors
        assert errors.count("error: ") == 1
        assert not output.exists()
