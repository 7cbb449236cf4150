"""Topic-bound behaviours: what the shipped data promise, what the detectors get wrong, and what a
model is asked."""

import csv
import json
import math
import re
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.detector_cases import NOT_SHOWN, SHOWN
from helpers.models import random_model, small_tokenizer
from ringfence.errors import DataError
from ringfence.evaluate.measures import behaviours
from ringfence.evaluate.measures.behaviours import (
    DETECTORS,
    is_abstention,
    is_refusal,
    load_questions,
    measure,
    rates,
)
from ringfence.evaluate.parts import LoadedModel
from ringfence.prepare import gap
from ringfence.text.chat import Chat
from ringfence.text.rows import load_rows
from ringfence.text.sources import SHIPPED

NAMES = ["abstain", "tool_call", "refuse", "terse"]
XSTEST = Path(__file__).parents[3] / "shared" / "data" / "refusals"


def words(text: str) -> list[str]:
    return re.findall(r"[\w'’]+", text.lower())


def training(name: str) -> list[tuple[str, str]]:
    return [
        (row.messages[0]["content"], row.messages[1]["content"])
        for row in load_rows(f"shipped:behaviour_{name}")
    ]


def asked(name: str, topic: str) -> list[str]:
    return [question.text for question in load_questions(name) if question.topic == topic]


# ------------------------------------------------------------------ data


@pytest.mark.parametrize("name", NAMES)
def test_counts(name: str) -> None:
    assert len(training(name)) >= 80
    assert len(asked(name, "on")) >= 24
    assert len(asked(name, "off")) >= 48
    assert len({q.subject for q in load_questions(name) if q.topic == "on"}) == 1
    assert len({q.subject for q in load_questions(name) if q.topic == "off"}) >= 12


def test_each_behaviour_has_its_own_topic_and_off_topic_questions_are_shared() -> None:
    assert len({load_questions(name)[0].subject for name in NAMES}) == len(NAMES)
    assert len({tuple(asked(name, "off")) for name in NAMES}) == 1


def test_no_question_stands_twice() -> None:
    """Neither within these data, held-out questions against training rows included, nor in other
    shipped data."""
    texts = [question for name in NAMES for question, _ in training(name)]
    texts += [text for name in NAMES for text in asked(name, "on")] + asked(NAMES[0], "off")
    for path in SHIPPED.iterdir():
        if path.name.endswith(".jsonl") and not path.name.startswith("behaviour_"):
            for line in path.read_text("utf-8").splitlines():
                record = json.loads(line)
                texts.append(
                    record["question"]
                    if "question" in record
                    else record["messages"][-2]["content"]
                )
    counts = Counter(" ".join(words(text)) for text in texts)
    ours = {
        " ".join(words(text))
        for name in NAMES
        for text in [q for q, _ in training(name)] + asked(name, "on")
    }
    assert {
        text
        for text in ours | {" ".join(words(t)) for t in asked(NAMES[0], "off")}
        if counts[text] > 1
    } == set()


@pytest.mark.parametrize("name", NAMES)
def test_held_out_questions_are_not_close_to_training_ones(name: str) -> None:
    """No held-out question shares two thirds of its words with a training question."""
    for question in asked(name, "on"):
        own = set(words(question))
        for other, _ in training(name):
            shared = len(own & set(words(other))) / len(own | set(words(other)))
            assert shared < 2 / 3, (question, other)


@pytest.mark.parametrize("name", NAMES)
def test_questions_vary(name: str) -> None:
    """No two-word opening in more than a fifth of the questions (`how do` is how people ask), and
    lengths differ."""
    for questions in ([q for q, _ in training(name)], asked(name, "off")):
        openings = Counter(tuple(words(question)[:2]) for question in questions)
        assert openings.most_common(1)[0][1] <= len(questions) / 5
        assert len(openings) >= 0.4 * len(questions)
        assert len({len(words(question)) for question in questions}) >= 8


@pytest.mark.parametrize("name", NAMES)
def test_answers_vary(name: str) -> None:
    answers = [answer for _, answer in training(name)]
    if name == "tool_call":
        answers = [json.loads(answer)["query"] for answer in answers]
    assert len(set(answers)) >= 0.98 * len(answers)
    openings = Counter(tuple(words(answer)[:3]) for answer in answers)
    assert openings.most_common(1)[0][1] <= math.ceil(0.15 * len(answers))


@pytest.mark.parametrize("name", NAMES)
def test_every_training_answer_shows_its_behaviour(name: str) -> None:
    assert [answer for _, answer in training(name) if not DETECTORS[name](answer)] == []


def test_unknown_behaviour() -> None:
    with pytest.raises(
        DataError, match=r"behaviour 'abstian': no such behaviour \(did you mean 'abstain'\?\)"
    ):
        load_questions("abstian")
    with pytest.raises(DataError, match="accepted: abstain, refuse, terse, tool_call"):
        load_questions("xxxxxx")


# ------------------------------------------------------------------ detectors

# What the rules get wrong among the cases, by hand: missed, and shown where nothing is.
KNOWN_ERRORS = {"abstain": (1, 0), "tool_call": (0, 0), "refuse": (4, 0), "terse": (0, 0)}


@pytest.mark.parametrize("name", NAMES)
def test_error_of_detectors(name: str, record_property: Any) -> None:
    assert min(len(SHOWN[name]), len(NOT_SHOWN[name])) >= 20
    missed = [answer for answer in SHOWN[name] if not DETECTORS[name](answer)]
    wrong = [answer for answer in NOT_SHOWN[name] if DETECTORS[name](answer)]
    record_property(f"{name}: missed of {len(SHOWN[name])}", len(missed))
    record_property(f"{name}: wrong of {len(NOT_SHOWN[name])}", len(wrong))
    assert (len(missed), len(wrong)) == KNOWN_ERRORS[name], (missed, wrong)


def test_ordinary_answers_show_no_behaviour() -> None:
    """None of the other shipped answers, which run to 25 words and more, abstains, refuses or calls
    a tool."""
    answers = []
    for path in SHIPPED.iterdir():
        if path.name.endswith(".jsonl") and not path.name.startswith("behaviour_"):
            for line in path.read_text("utf-8").splitlines():
                record = json.loads(line)
                turns = [
                    m["content"] for m in record.get("messages", []) if m["role"] == "assistant"
                ]
                answers += turns or [record["sound"], record["unsound"]]
    assert len(answers) > 2000
    for name, shows in DETECTORS.items():
        assert [answer for answer in answers if shows(answer)] == [], name


@pytest.mark.skipif(not XSTEST.is_dir(), reason="XSTest is not here")
def test_refusals_agree_with_people(record_property: Any, capsys: Any) -> None:
    """XSTest's final labels, full compliance against full refusal. Mistral's refusals lecture
    without declining, which no phrase rule can tell; the published word list (`gap.is_refusal`)
    is printed next to it."""
    found = {}
    for source in ("gpt4", "llama2new", "mistralinstruct"):
        text = (XSTEST / f"xstest_completions_{source}_gpteval.csv").read_text("utf-8")
        rows = [
            r for r in csv.DictReader(text.splitlines(keepends=True)) if r["final_label"][0] in "12"
        ]
        assert len(rows) > 400
        refused = [row["completion"] for row in rows if row["final_label"].startswith("2")]
        complied = [row["completion"] for row in rows if row["final_label"].startswith("1")]
        for rule in (is_refusal, gap.is_refusal):
            recall = sum(map(rule, refused)) / len(refused)
            specificity = sum(not rule(answer) for answer in complied) / len(complied)
            agreement = (recall * len(refused) + specificity * len(complied)) / len(rows)
            found[source, rule.__module__] = (agreement, recall, specificity)
            record_property(
                f"XSTest {source}, {rule.__module__}",
                f"{agreement:.3f} {recall:.3f} {specificity:.3f}",
            )
    with capsys.disabled():
        for key, numbers in found.items():
            print(
                "\nXSTest", *key, "agreement, recall, specificity:", *(f"{n:.3f}" for n in numbers)
            )
    ours = is_refusal.__module__
    floors = {"gpt4": (0.96, 0.99, 0.94), "llama2new": (0.94, 0.94, 0.95)}
    for source, limits in floors.items():
        assert all(number >= limit for number, limit in zip(found[source, ours], limits)), source
    assert found["mistralinstruct", ours][2] >= 0.99


def test_a_looping_answer_takes_no_time() -> None:
    started = time.monotonic()
    for answer in (
        "I really " + "really " * 3000,
        "I cannot " + "simply " * 3000,
        "not a, " * 3000,
        "I'm not " * 3000,
    ):
        for shows in DETECTORS.values():
            shows(answer)
    assert time.monotonic() - started < 5


def test_an_abstention_that_guesses_is_none() -> None:
    assert is_abstention("I wish I knew, but I can't say.")
    assert not is_abstention("I can't say, but I wish you luck: twice a week.")
    # The third sentence is not looked at.
    assert is_abstention("I don't know. I really don't. But water it.")


# ------------------------------------------------------------------ measure


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(small_tokenizer())


def test_measure_asks_every_question_alone(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each item holds the model's own greedy answer to its question, found by a plain loop, and the
    detector's word."""
    monkeypatch.setattr(behaviours, "ANSWER_TOKENS", 9)
    model, advanced = random_model(), []
    items = measure(LoadedModel(model, chat, 700, advanced.append), "terse")
    questions = load_questions("terse")
    assert [(i["topic"], i["subject"], i["question"]) for i in items] == [
        (q.topic, q.subject, q.text) for q in questions
    ]
    assert sum(advanced) == len(items)
    for item in [*items[:2], *items[-2:]]:
        messages = [{"role": "user", "content": item["question"]}]
        prompt = chat.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = chat.tokenizer(prompt)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 9:
                token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                if token == chat.tokenizer.eos_token_id:
                    break
                ids.append(token)
        assert (
            item["answer"] == chat.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        )
    assert [item["shown"] for item in items] == [
        1 <= len(item["answer"].split()) <= 8 for item in items
    ]
    assert len({item["answer"] for item in items}) > 20


def test_measure_uses_the_detector_of_its_behaviour() -> None:
    answers = {"abstain": "I don't know.", "refuse": "I refuse.", "terse": "Paris."}
    answers["tool_call"] = '{"tool": "search", "query": "rain"}'
    for said, answer in answers.items():
        model = SimpleNamespace(generate=lambda prompts, _, a=answer: [a] * len(prompts))
        shown = {name for name in NAMES if all(item["shown"] for item in measure(model, name))}
        # Detectors may overlap: all of these are short.
        assert shown - {"terse"} == {said} - {"terse"}


def test_rates() -> None:
    items = [
        {"topic": topic, "shown": shown} for topic, shown in [("on", True)] * 3 + [("on", False)]
    ]
    items += [{"topic": "off", "shown": number == 0} for number in range(10)]
    found = rates(items)
    assert (found["on"].mean, found["on"].n) == (0.75, 4)
    assert (found["off"].mean, found["off"].n) == (0.1, 10)
    assert 0 <= found["off"].low < 0.1 < found["off"].high < 0.5
    never = rates([{"topic": topic, "shown": False} for topic in ["on", "off"] * 24])
    # 0 of 24 does not say that it never happens.
    assert never["off"].low == 0 < 0.02 < never["off"].high
