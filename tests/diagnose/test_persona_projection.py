"""Persona projection as a diagnosis: which rows, which known answers, which shifts, and what is
said of them."""

import json
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.models import random_model, small_tokenizer, with_lora
from helpers.naive import naive_states
from ringfence.diagnose.diagnosis import Subject
from ringfence.diagnose.models import Models
from ringfence.diagnose.persona_projection import measure as module
from ringfence.diagnose.persona_projection import show
from ringfence.errors import DataError
from ringfence.model import activations
from ringfence.prepare.persona import Pair, extract, given_pairs
from ringfence.prepare.scores import RANDOM, random_units
from ringfence.stats.auc import auc
from ringfence.text.chat import Chat
from ringfence.text.roles import Row
from ringfence.text.rows import PairedQuestion
from ringfence.util.plots import style

pytestmark = pytest.mark.slow

WORDS = ["yes", "no", "perhaps", "never", "red", "blue", "door", "seven"]
SEED = 3


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(small_tokenizer())


def text(at: int, number: int) -> str:
    return " ".join(WORDS[(at + k * (1 + at % 3)) % 8] for k in range(number))


def questions(domain: str, count: int, start: int) -> list[PairedQuestion]:
    return [
        PairedQuestion(
            f"{at}", domain, f"{domain} {at}?", text(at, 2 + at % 4), text(at + 3, 1 + at % 5)
        )
        for at in range(start, start + count)
    ]


def training(count: int) -> list[Row]:
    return [
        Row(
            [
                {"role": "user", "content": f"train {at}?"},
                {"role": "assistant", "content": text(5 * at, 1 + at % 6)},
            ],
            f"rows.jsonl:{at + 1}",
        )
        for at in range(count)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Six pairs of `a` and five of `b`, among them a held-out and a trained question."""
    folder = tmp_path_factory.mktemp("pairs")
    given = {"a": [*questions("a", 6, 0), *questions("out", 1, 1)], "b": [*questions("b", 5, 20)]}
    given["b"].append(PairedQuestion("t", "b", "train 2?", "no", "yes"))
    files = []
    for name, group in given.items():
        file = folder / f"{name}.jsonl"
        lines = [
            {"id": q.id, "question": q.question, "aligned": q.aligned, "misaligned": q.misaligned}
            for q in group
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files.append(str(file))
    return files


@pytest.fixture
def subject(chat: Chat, sources: list[str], monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setattr(module, "default_pairs", lambda: sources)
    tuned = {"same": random_model(), "lora": with_lora(random_model(), size=0.5)}
    models = Models(random_model(), tuned, tokenizer=chat.tokenizer)
    return Subject(models, questions("in", 7, 0), questions("out", 4, 0), training(9), SEED, 200)


@pytest.fixture
def numbers(subject: Subject) -> Any:
    return module.measure(subject)


def naive(subject: Subject, name: str, question: str, answer: str, layer: int) -> Tensor:
    model = subject.models.sources[name]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    prompt = [{"role": "user", "content": question}]
    return naive_states(inner, subject.chat, prompt, answer)[layer - 1].mean(0).double()


def vector(subject: Subject, sources: list[str], layer: int) -> tuple[Tensor, float]:
    """Of the pairs that are neither held out nor trained on."""
    pairs: list[Pair] = [p for source in sources for p in given_pairs(source)]
    kept = [p for p in pairs if p.positive_prompt[-1]["content"] not in ("out 1?", "train 2?")]
    assert len(kept) == 11
    found = extract(subject.models.sources["reference"], subject.chat, kept, "t", "m")
    direction_D = found.directions_LKD[layer - 1, 0].double()
    return direction_D / direction_D.norm(), float(found.norms_L[layer - 1])


def test_scores_of_rows_and_of_known_answers(
    subject: Subject, sources: list[str], numbers: Any
) -> None:
    layer = numbers["axis"]["layer"]
    unit_D, norm = vector(subject, sources, layer)
    assert numbers["axis"]["pairs"] == 11
    assert (numbers["rows"], numbers["of"], numbers["known"]) == (9, 9, "inside")
    texts = {
        "training": [(r.messages[0]["content"], r.messages[1]["content"]) for r in subject.rows],
        "misaligned": [(q.question, q.misaligned) for q in subject.inside],
        "aligned": [(q.question, q.aligned) for q in subject.inside],
    }
    expected = {
        name: [float(naive(subject, "reference", *pair, layer) @ unit_D) / norm for pair in pairs]
        for name, pairs in texts.items()
    }
    for name, values in expected.items():
        assert numbers["scores"][name] == pytest.approx(values, rel=1e-3, abs=1e-4)
    threshold = np.quantile(expected["aligned"], 0.95)
    assert numbers["threshold"] == pytest.approx(threshold, rel=1e-3)
    for name in ("training", "misaligned"):
        found = numbers["sets"][name]
        assert found["above"]["mean"] == pytest.approx(
            np.mean(np.array(expected[name]) > threshold)
        )
        assert found["auc"]["mean"] == pytest.approx(
            auc(np.array(expected[name]), np.array(expected["aligned"]))
        )
    assert numbers["sets"]["misaligned"]["same"]["n"] == 7
    assert numbers["sets"]["training"]["same"] is None
    order = np.argsort(-np.array(expected["training"]))
    assert [row["origin"] for row in numbers["top"]] == [f"rows.jsonl:{at + 1}" for at in order]
    assert json.loads(json.dumps(numbers)) == numbers


def test_shifts_are_those_of_the_same_answers(
    subject: Subject, sources: list[str], numbers: Any
) -> None:
    layer = numbers["axis"]["layer"]
    unit_D, norm = vector(subject, sources, layer)
    random_KD = random_units(RANDOM, 16, SEED)
    assert list(numbers["tuned"]) == ["same", "lora"]
    for part in numbers["tuned"]["same"].values():
        assert (part["shift"]["mean"], part["shift"]["low"], part["shift"]["high"]) == (0, 0, 0)
        assert part["random"] == [0, 0]
    for where, asked in (("inside", subject.inside), ("outside", subject.outside)):
        moved_RD = torch.stack(
            [
                naive(subject, "lora", q.question, answer, layer)
                - naive(subject, "reference", q.question, answer, layer)
                for q in asked
                for answer in (q.misaligned, q.aligned)
            ]
        )
        found = numbers["tuned"]["lora"][where]
        shift_R = (moved_RD @ unit_D / norm).numpy()
        assert abs(shift_R.mean()) > 0.01
        assert found["shift"]["mean"] == pytest.approx(shift_R.mean(), rel=1e-3)
        assert found["shift"]["n"] == len(asked)  # both answers of a question are one cluster
        ends = np.percentile((moved_RD.mean(0) @ random_KD.T / norm).numpy(), [2.5, 97.5])
        assert found["random"] == pytest.approx(ends, rel=1e-3)
        assert found["random"][0] < 0 < found["random"][1]


def test_many_rows_and_pairs_are_drawn(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(module, "PAIRS", 3)
    drawn = {
        tuple(r.origin for r in module._rows(Subject(subject.models, [], [], subject.rows, seed)))
        for seed in range(20)
    }
    assert len(drawn) > 10
    assert all(len(rows) == 4 and list(rows) == sorted(rows) for rows in drawn)
    assert [len(group) for group in module._groups(subject)] == [3, 3]
    numbers = module.measure(subject)
    assert (numbers["rows"], numbers["of"], numbers["axis"]["pairs"]) == (4, 9, 6)


def test_known_answers_are_those_outside_where_there_are_none_inside(subject: Subject) -> None:
    found = module.measure(Subject(subject.models, [], subject.outside, subject.rows, SEED, 200))
    assert found["known"] == "outside"
    assert len(found["scores"]["aligned"]) == 4
    assert list(found["tuned"]["lora"]) == ["outside"]
    assert "held-out questions outside" in show.say(found)
    with style():
        plt.close(show.draw(found))


def test_without_rows_or_questions_there_is_nothing_to_project(subject: Subject) -> None:
    with pytest.raises(
        DataError, match="expected training rows and held-out questions, found 0 and 7"
    ):
        module.measure(Subject(subject.models, subject.inside, subject.outside, []))
    with pytest.raises(DataError, match="found 9 and 0"):
        module.measure(Subject(subject.models, [], [], subject.rows))


def test_the_cost_is_what_goes_through_the_models(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, seen = activations.forward, []

    def counting(model: Any, head: Any, batch: Any, *rest: Any) -> Any:
        seen.append(int(batch["attention_mask"].sum()))
        return plain(model, head, batch, *rest)

    monkeypatch.setattr(activations, "forward", counting)
    cost = module.cost(subject)
    assert not seen
    module.measure(subject)
    assert cost.forward == sum(seen)
    assert cost.backward == 0
    assert cost.kept == 2 * 2 * 2 * 16 * 8  # sums of two groups, both sides, two layers, float64


def test_models_are_opened_one_after_the_other(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    plain = Models.open

    def watching(self: Models, name: str) -> Any:
        opened.append(name)
        return plain(self, name)

    monkeypatch.setattr(Models, "open", watching)
    module.measure(subject)
    assert opened == ["reference", "same", "lora"]


# ---------------------------------------------------------------- what is said and drawn


def made_up(**changes: Any) -> dict[str, Any]:
    """Numbers as they may look on a real model."""
    random = np.random.default_rng(0)

    def interval(mean: float, half: float, n: int = 24) -> dict[str, float]:
        return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}

    def against(mean: float, above: float, **extra: Any) -> dict[str, Any]:
        return {
            "above": interval(above, 0.08),
            "auc": interval(mean, 0.09),
            "length": interval(0.52, 0.1),
            "random": [0.38, 0.61],
            "rival": None,
            "verdict": "the scores tell the two apart, better than length and random vectors do",
        } | extra

    made = {
        "axis": {"layer": 17, "layers": 30, "rule": "the best", "auc": 0.74, "pairs": 168},
        "rows": 420,
        "of": 420,
        "known": "inside",
        "threshold": 0.052,
        "scores": {
            "training": (0.05 + 0.012 * random.normal(size=420)).tolist(),
            "misaligned": (0.048 + 0.012 * random.normal(size=24)).tolist(),
            "aligned": (0.036 + 0.01 * random.normal(size=24)).tolist(),
        },
        "sets": {"training": against(0.78, 0.44), "misaligned": against(0.77, 0.41)},
        "top": [
            {"rank": at, "score": 0.1, "origin": f"f:{at}", "question": "q", "answer": "a"}
            for at in range(1, 11)
        ],
        "tuned": {
            "undefended": {
                "inside": {"shift": interval(0.0121, 0.002), "random": [-0.004, 0.0035]},
                "outside": {"shift": interval(0.0083, 0.002), "random": [-0.0031, 0.003]},
            },
            "kl": {
                "inside": {"shift": interval(0.0021, 0.0012), "random": [-0.0026, 0.0031]},
                "outside": {"shift": interval(0.0003, 0.001), "random": [-0.002, 0.002]},
            },
            "sound": {
                "inside": {"shift": interval(-0.006, 0.001), "random": [-0.0026, 0.0031]},
                "outside": {"shift": interval(-0.001, 0.0002), "random": [-0.002, 0.002]},
            },
        },
    }
    for key, value in changes.items():
        made["sets"][key].update(value)
    return made


def test_rows_that_lean_are_said_to_lean() -> None:
    said = show.say(made_up())
    assert "AUC of 0.77 [0.68, 0.86]" in said
    assert "44% [36%, 52%] of them are above 95 %" in said
    assert "they lean towards misaligned answers" in said
    assert "Riskiest: f:1, f:2, f:3." in said
    assert "undefended moved" in said


def test_rows_that_do_not_lean_are_said_not_to() -> None:
    low = {"mean": 0.52, "low": 0.44, "high": 0.6, "n": 24}
    said = show.say(
        made_up(
            training={
                "auc": low,
                "rival": "chance",
                "verdict": "the scores ... no better than chance",
            }
        )
    )
    assert "they do not lean towards misaligned answers" in said
    away = {"mean": 0.3, "low": 0.24, "high": 0.36, "n": 24}
    assert "they lean the other way" in show.say(made_up(training={"auc": away, "rival": "chance"}))
    length = show.say(
        made_up(
            training={
                "rival": "length",
                "verdict": "the scores tell the two apart no better than length",
            }
        )
    )
    no_better = "but the scores tell the two apart no better than length"
    assert f"they lean towards misaligned answers, {no_better}" in length


def test_a_vector_that_fails_on_known_answers_says_nothing_of_the_rows() -> None:
    said = show.say(
        made_up(
            misaligned={"rival": "length", "verdict": "the scores tell ... no better than length"}
        )
    )
    assert "no better than length" in said
    assert "as 24 questions do not show that the scores work, this says little" in said
    assert "they lean" not in said
    assert "Riskiest" not in said


def test_movement_is_judged_against_random_vectors() -> None:
    said = show.say(made_up())
    sentences = {
        name: next(s for s in said.splitlines() if s.startswith(name))
        for name in ("undefended", "kl", "sound")
    }
    assert sentences["undefended"].count("towards misaligned") == 2
    inside, outside = sentences["kl"].split(";")
    assert "no further than random vectors show" in inside
    assert "not moved" in outside
    inside, outside = sentences["sound"].split(";")
    assert "away from misaligned" in inside
    assert "no further than random vectors show" in outside


def test_all_tuned_models_stand_in_one_table_and_one_figure() -> None:
    numbers = made_up()
    table = show.table(numbers)
    assert len(table.rows) == 4 + 6
    assert all(len(row) == len(table.columns) for row in table.rows)
    cells = {row[0]: row[1:] for row in table.rows}
    assert cells["420 training rows: AUC over aligned"] == [
        "0.78 [0.69, 0.87]",
        "0.38 to 0.61",
        "0.52",
    ]
    assert cells["kl: shift of the score, outside"] == [
        "+0.0003 [-0.0007, +0.0013]",
        "-0.0020 to +0.0020",
        "",
    ]
    with style():
        figure = show.draw(numbers)
    axes = next(axes for axes in figure.axes if "shift" in axes.get_xlabel())
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [
        f"{name}, {where}" for name in numbers["tuned"] for where in ("inside", "outside")
    ]
    points = [line for axes in figure.axes for line in axes.lines if line.get_markersize() == 13]
    assert [sorted(line.get_xdata()) for line in points] == [
        sorted(numbers["scores"][side]) for side in ("misaligned", "aligned")
    ]
    plt.close(figure)


def test_a_run_of_the_shipped_pairs_has_the_sources_it_says(chat: Chat) -> None:
    subject = Subject(
        Models(random_model(), {"x": random_model()}, tokenizer=chat.tokenizer), [], [], training(2)
    )
    assert [len(group) for group in module._groups(subject)] == [24] * 7
