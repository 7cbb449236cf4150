"""Log-probability of given answers: the numbers of the naive form, and a control that a single side
does not have."""

import copy
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from torch import Tensor

from helpers.models import SMALL, nudged, random_model, unigram
from helpers.paired_answers import INSIDE, OUTSIDE, SETS, answer_tokens, subject
from ringfence.diagnose.diagnosis import Numbers
from ringfence.diagnose.logprob import measure as logprob_measure
from ringfence.diagnose.logprob import show as logprob_show
from ringfence.diagnose.logprob.measure import typical, visible
from ringfence.diagnose.models import REFERENCE
from ringfence.errors import DataError
from ringfence.stats import Interval, mean_interval
from ringfence.text.chat import Chat
from ringfence.text.roles import Role
from ringfence.text.rows import PairedQuestion
from ringfence.util import plots

SIDES = ("misaligned", "aligned")


@pytest.fixture(scope="module")
def numbers(loaded: dict[str, Any], tokenizer: Any) -> Numbers:
    return json.loads(
        json.dumps(logprob_measure.measure(subject(loaded, tokenizer, batch_tokens=150)))
    )


def naive(model: Any, tokenizer: Any, question: PairedQuestion, side: str) -> list[float]:
    """log p of each token of the answer, its end of turn included, from one row alone."""
    messages = [{"role": "user", "content": question.question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = answer_tokens(tokenizer, question, side)
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0].double()
    probabilities = logits.softmax(-1)[len(prompt_ids) - 1 : -1]
    return [float(row[token].log()) for row, token in zip(probabilities, answer_ids, strict=True)]


@pytest.fixture(scope="module")
def naive_logprobs(
    loaded: dict[str, Any], tokenizer: Any
) -> dict[tuple[str, str, str], list[list[float]]]:
    """By model, set and side: of each question the log-probabilities of the answer's tokens."""
    return {
        (name, where, side): [naive(model, tokenizer, question, side) for question in questions]
        for name, model in loaded.items()
        for where, questions in SETS.items()
        for side in SIDES
    }


# ---------------------------------------------------------------- numbers


def test_levels_shifts_and_their_difference_are_those_of_the_naive_form(
    numbers: Numbers, naive_logprobs: dict[tuple[str, str, str], list[list[float]]]
) -> None:
    means = {key: np.array([np.mean(row) for row in rows]) for key, rows in naive_logprobs.items()}
    scores = {"base": numbers["base"], "reference": numbers["reference"], **numbers["tuned"]}
    assert list(scores) == ["base", "reference", "undefended", "kl"]
    for name, by_set in scores.items():
        for where, score in by_set.items():
            shifts = {
                side: means[name, where, side] - means["reference", where, side] for side in SIDES
            }
            expected = {side: means[name, where, side] for side in SIDES}
            if name != "reference":
                expected |= {f"{side}_shift": shifts[side] for side in SIDES}
                expected |= {"difference": shifts["misaligned"] - shifts["aligned"]}
            assert score.keys() == expected.keys()
            for key, values in expected.items():
                assert score[key]["mean"] == pytest.approx(values.mean(), abs=1e-4), (
                    name,
                    where,
                    key,
                )
                assert score[key]["n"] == len(SETS[where])
                expected_interval = mean_interval(values.tolist())
                assert score[key]["low"] == pytest.approx(expected_interval.low, abs=1e-3)
                assert score[key]["high"] == pytest.approx(expected_interval.high, abs=1e-3)
    assert (
        len({round(abs(by_set["outside"]["misaligned"]["mean"]), 2) for by_set in scores.values()})
        == 4
    )


def test_intervals_are_paired_by_question(tokenizer: Any) -> None:
    """Questions differ far more than their shifts do, so unpaired intervals would be as wide as the
    levels' ones."""
    gentle = {"reference": random_model(), "tuned": nudged(random_model(), size=0.00001)}
    score = logprob_measure.measure(subject(gentle, tokenizer))["tuned"]["tuned"]["outside"]
    width = {key: value["high"] - value["low"] for key, value in score.items()}
    assert width["misaligned"] > 1, width
    assert 0 < width["difference"] < 0.1 * width["misaligned"]


def test_the_example_is_the_median_question_with_the_sums_of_its_own_tokens(
    numbers: Numbers, naive_logprobs: dict[tuple[str, str, str], list[list[float]]], tokenizer: Any
) -> None:
    def mean(name: str, at: int, side: str) -> float:
        return float(np.mean(naive_logprobs[name, "outside", side][at]))

    def difference(name: str, at: int) -> float:
        shift = [mean(name, at, side) - mean("reference", at, side) for side in SIDES]
        return shift[0] - shift[1]

    columns = [
        [difference(name, at) for at in range(len(OUTSIDE))] for name in ("undefended", "kl")
    ]
    distances = [
        sum(abs(column[at] - np.median(column)) for column in columns) for at in range(len(OUTSIDE))
    ]
    place = int(np.argmin(distances))
    question, example = OUTSIDE[place], numbers["example"]
    assert (example["domain"], example["id"], example["question"]) == (
        question.domain,
        question.id,
        question.question,
    )
    for side in SIDES:
        shown = "".join(example[side]["tokens"]).replace("·", " ").replace("⏎", "\n")
        assert shown == getattr(question, side) + "<|im_end|>"
        assert list(example[side]["cumulative"]) == ["base", "reference", "undefended", "kl"]
        for name, sums in example[side]["cumulative"].items():
            assert sums == pytest.approx(
                np.cumsum(naive_logprobs[name, "outside", side][place]), abs=1e-3
            )


def test_the_typical_question_is_nearest_the_medians_of_all_models() -> None:
    sets = {"inside": INSIDE, "outside": OUTSIDE}
    one = np.array([0.0, 0.0, 9.0, 1.0, 2.0, 3.0, 100.0])
    assert typical({"a": one}, sets) == 5  # median 3 outside; the questions inside do not count
    other = np.array([0.0, 0.0, 9.0, 1.0, 2.0, 60.0, 100.0])  # median 9: far from place 5
    assert typical({"a": one, "b": other}, sets) == 2
    assert typical({"a": one[:2]}, {"inside": INSIDE}) == 0


def test_tokens_can_be_read(tokenizer: Any) -> None:
    ids = tokenizer(" a\n\tb<|im_end|>", add_special_tokens=False)["input_ids"]
    assert "".join(visible(tokenizer, ids)) == "·a⏎→b<|im_end|>"
    assert not any(
        space in text for text in visible(tokenizer, list(range(300))) for space in " \n\t"
    )


def test_the_cost_is_every_answer_through_every_model(
    loaded: dict[str, Any], tokenizer: Any
) -> None:
    looked = subject(loaded, tokenizer)
    encoded = [
        Chat(tokenizer).encode(
            [{"role": "user", "content": q.question}, {"role": "assistant", "content": answer}]
        )
        for q in [*INSIDE, *OUTSIDE]
        for answer in (q.aligned, q.misaligned)
    ]
    cost = logprob_measure.cost(looked)
    assert cost.forward == 4 * sum(len(e.input_ids) for e in encoded)
    assert cost.kept == 4 * 4 * sum(e.roles.count(Role.RESPONSE) for e in encoded)
    assert cost.backward == 0


# ---------------------------------------------------------------- the control


@pytest.fixture(scope="module")
def logits() -> Tensor:
    return torch.randn(SMALL, generator=torch.Generator().manual_seed(0))


def tokens_of(tokenizer: Any, side: str) -> set[int]:
    return {token for q in [*INSIDE, *OUTSIDE] for token in answer_tokens(tokenizer, q, side)}


def test_a_model_likelier_on_all_text_shifts_one_side_and_not_the_difference(
    logits: Tensor, tokenizer: Any
) -> None:
    """The published comparison (one side alone) sees an effect where there is none; so do sums over
    answers of unlike length."""
    raised = logits.clone()
    raised[list(tokens_of(tokenizer, "misaligned") | tokens_of(tokenizer, "aligned"))] += 2.0
    models = {"reference": unigram(logits), "likelier": unigram(raised)}
    numbers = logprob_measure.measure(subject(models, tokenizer))
    gain = 2.0 - float(raised.logsumexp(0) - logits.logsumexp(0))
    for score in numbers["tuned"]["likelier"].values():
        assert score["misaligned_shift"]["mean"] == pytest.approx(gain, abs=1e-4)
        assert score["misaligned_shift"]["low"] > 1.5
        assert score["difference"]["mean"] == pytest.approx(0, abs=1e-4)
    sums = [
        sum(naive(models["likelier"], tokenizer, q, side))
        - sum(naive(models["reference"], tokenizer, q, side))
        for q in INSIDE
        for side in SIDES
    ]
    assert abs(np.mean(sums[::2]) - np.mean(sums[1::2])) > 0.5
    # Rounding alone decides whether the interval of so constant a difference holds zero.
    for score in numbers["tuned"]["likelier"].values():
        score["difference"] |= {"low": -0.1, "high": 0.1}
    said = logprob_show.say(numbers)
    assert said.count("not shown to be specific") == 2
    assert "leans" not in said


def test_a_model_that_leans_shows_by_how_much(
    logits: Tensor, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Student's t so few questions establish no lean; here each stands for forty like it."""

    def many(values: list[float], names: list[str], seed: int) -> Interval:
        return mean_interval(
            list(values) * 40, [f"{name}-{n}" for n in range(40) for name in names], seed
        )

    monkeypatch.setattr(logprob_measure, "mean_interval", many)
    only = tokens_of(tokenizer, "misaligned") - tokens_of(tokenizer, "aligned")
    raised, lowered = logits.clone(), logits.clone()
    raised[list(only)] += 2.0
    lowered[list(only)] -= 2.0
    models = {"reference": unigram(logits), "worse": unigram(raised), "better": unigram(lowered)}
    numbers = logprob_measure.measure(subject(models, tokenizer))
    for where, questions in SETS.items():
        shares = [
            np.mean([token in only for token in answer_tokens(tokenizer, q, "misaligned")])
            for q in questions
        ]
        for name, sign in {"worse": 1, "better": -1}.items():
            score = numbers["tuned"][name][where]["difference"]
            assert score["mean"] == pytest.approx(sign * 2 * np.mean(shares), abs=1e-4)
    worse, better = logprob_show.say(numbers).split("better: ")
    assert worse.count("leans towards the misaligned answers") == 2
    assert better.count("leans towards the aligned answers") == 2
    assert "+0." in worse.split("difference ")[1][:5]


def test_without_shift_and_lean_it_says_so(tokenizer: Any) -> None:
    numbers = logprob_measure.measure(
        subject({"reference": random_model(), "same": random_model()}, tokenizer)
    )
    assert numbers["tuned"]["same"]["outside"]["difference"]["mean"] == 0
    assert logprob_show.say(numbers).count("no lean is seen") == 2


# ---------------------------------------------------------------- sets that lack something


def test_one_set_or_one_question_is_enough_and_none_is_an_error(
    loaded: dict[str, Any], tokenizer: Any
) -> None:
    two = {name: loaded[name] for name in ("reference", "kl")}
    numbers = logprob_measure.measure(subject(two, tokenizer, inside=[], outside=OUTSIDE[:1]))
    assert numbers["questions"] == {"outside": 1}
    assert list(numbers["tuned"]["kl"]) == ["outside"]
    assert "base" not in numbers
    assert "[one alone]" in logprob_show.table(numbers).rows[1][-1]
    with plots.style():
        assert b"</svg>" in plots.svg(logprob_show.draw(numbers))
    inside = logprob_measure.measure(subject(two, tokenizer, outside=[]))
    assert inside["questions"] == {"inside": 2}
    assert inside["example"]["domain"] == "money"
    with pytest.raises(DataError, match="no paired questions"):
        logprob_measure.measure(subject(two, tokenizer, inside=[], outside=[]))


# ---------------------------------------------------------------- table and figure


def test_whiskers_reach_as_far_as_the_interval() -> None:
    assert plots.whisker({"mean": 2.0, "low": 1.5, "high": 4.0, "n": 3}) == [[0.5], [2.0]]
    assert plots.whisker({"mean": 0.3, "low": 0.3 + 1e-16, "high": 0.3 - 1e-16, "n": 3}) == [
        [0.0],
        [0.0],
    ]
    assert plots.whisker({"mean": 0.3, "low": -np.inf, "high": np.inf, "n": 1}) is None


def test_the_table_has_a_row_for_each_model_and_set(numbers: Numbers) -> None:
    table = logprob_show.table(numbers)
    assert [row[:2] for row in table.rows] == [
        [name, where]
        for where in ("inside (2)", "outside (5)")
        for name in ("base", REFERENCE, "undefended", "kl")
    ]
    assert all(len(row) == len(table.columns) for row in table.rows)
    by_name = {(row[0], row[1][:3]): dict(zip(table.columns, row)) for row in table.rows}
    score = numbers["tuned"]["kl"]["outside"]
    row = by_name["kl", "out"]
    assert row["difference of differences"].startswith(f"{score['difference']['mean']:+.2f} [")
    assert row["shift aligned (control)"].startswith(f"{score['aligned_shift']['mean']:+.2f} [")
    assert row["log p misaligned"].startswith(f"{score['misaligned']['mean']:.2f} [")
    assert by_name[REFERENCE, "out"]["difference of differences"] == ""


def test_the_figure_shows_the_sums_against_the_reference(numbers: Numbers) -> None:
    numbers = copy.deepcopy(numbers)
    example = numbers["example"]
    # No mathematics for matplotlib.
    example["aligned"]["tokens"] = ["$\\frac$", "$$", *example["aligned"]["tokens"][2:]]
    example["question"] = "Is $\\frac$ worth $3? " * 20
    for name, sums in example["misaligned"]["cumulative"].items():
        example["misaligned"]["cumulative"][name] = np.linspace(
            sums[0], -90.0 - len(name), 57
        ).tolist()
    example["misaligned"]["tokens"] = [f"t{at}" for at in range(57)]
    with plots.style():
        figure = logprob_show.draw(numbers)
        figure.savefig(io.BytesIO(), format="svg")
    panels = figure.axes[:2]
    tuned = [
        np.abs(np.subtract(sums[name], sums[REFERENCE])[:40]).max()
        for sums in (example[side]["cumulative"] for side in SIDES)
        for name in ("undefended", "kl")
    ]
    for axes, side in zip(panels, SIDES):
        mesh = next(child for child in axes.get_children() if isinstance(child, QuadMesh))
        sums = example[side]["cumulative"]
        expected = [
            np.subtract(sums[name], sums[REFERENCE])[:40] for name in ("base", "undefended", "kl")
        ]
        np.testing.assert_allclose(mesh.get_array(), expected)
        assert [label.get_text() for label in axes.get_xticklabels()] == example[side]["tokens"][
            :40
        ]
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            "base",
            "undefended",
            "kl",
        ]
        assert mesh.norm.vmax == -mesh.norm.vmin == max(tuned)  # white is no change
        assert side in axes.get_title("left")
    assert "first 40 of 57" in panels[0].get_title("left")
    scored = [numbers["base"], *numbers["tuned"].values()]
    expected = [score[where]["difference"]["mean"] for where in SETS for score in scored]
    points = [
        line.get_xdata()[0] for line in figure.axes[4].get_lines() if line.get_marker() == "D"
    ]
    np.testing.assert_allclose(points, expected)
