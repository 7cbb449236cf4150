"""Scores of training rows: projections of exactly the response tokens, honest AUCs, and what the
command says."""

import io
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score
from torch import Tensor

from helpers.models import random_model, small_tokenizer
from helpers.naive import naive_states
from helpers.rows import messages
from helpers.runs import small_model
from ringfence import stats
from ringfence.errors import DataError, ModelError
from ringfence.evaluate.answers.calibrate import auc_interval as other_auc_interval
from ringfence.model.directions import Directions
from ringfence.model.loading import load_model
from ringfence.prepare.persona import Pair, extract, given_pairs
from ringfence.prepare.scores import (
    RANDOM,
    Axis,
    Contrast,
    Scored,
    compare,
    held_out_auc,
    learn_axis,
    question_of,
    random_units,
    read_axis,
    score,
    vectors_of_the_others,
)
from ringfence.prepare.screen import Screening, default_pairs, draw, other_pairs, show
from ringfence.stats import Interval, bounds
from ringfence.stats.auc import auc, auc_interval
from ringfence.text.chat import Chat
from ringfence.text.roles import Row
from ringfence.text.rows import load_questions, load_rows
from ringfence.util.plots import style

pytestmark = pytest.mark.slow

WORDS = ["yes", "no", "perhaps", "never", "red", "blue", "door", "seven"]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model()


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(small_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("model"))


def row(question: str, answer: str, origin: str = "f.jsonl:1", system: str | None = None) -> Row:
    return Row([*messages(question, system), {"role": "assistant", "content": answer}], origin)


def rows(count: int, start: int = 0, name: str = "f.jsonl") -> list[Row]:
    """Answers of unlike lengths, some behind a system prompt, some of two turns."""
    made = []
    for at in range(start, start + count):
        answer = " ".join(WORDS[(3 * at + k) % 8] for k in range(1 + 5 * at % 7))
        made.append(
            row(
                f"Question {at}, and what of it?",
                answer,
                f"{name}:{at + 1}",
                "Be brief." if at % 3 else None,
            )
        )
        if at % 4 == 1:
            made[-1].messages.extend(
                [*messages("Why?"), {"role": "assistant", "content": WORDS[at % 8]}]
            )
    return made


def pairs(count: int, start: int = 0) -> list[Pair]:
    return [
        Pair(
            str(at),
            messages(f"Pair {at}?"),
            messages(f"Pair {at}?"),
            " ".join(WORDS[(at + k) % 8] for k in range(1 + at % 5)),
            " ".join(WORDS[(3 * at + k) % 8] for k in range(2 + at % 3)),
        )
        for at in range(start, start + count)
    ]


def axis_of(unit_D: Tensor, norm: float = 1.0, layer: int = 1, layers: int = 2) -> Axis:
    return Axis(unit_D, norm, layer, layers, "haste", "tiny", "as given")


def naive_mean(model: Any, chat: Chat, one: Row, layer: int) -> Tensor:
    """Mean residual stream after a layer over the response tokens of an unpadded row."""
    return (
        naive_states(model, chat, one.messages[:-1], one.messages[-1]["content"])[layer - 1]
        .mean(0)
        .double()
    )


def scored(
    values: Any, name: str, questions: Any = None, random: Any = None, words: Any = None
) -> Scored:
    """Rows with given scores; `words` = length of each answer."""
    number = len(values)
    questions = range(number) if questions is None else questions
    words = [3] * number if words is None else words
    made = [
        row(f"{q}?", "red " * w, f"{name}:{at}") for at, (q, w) in enumerate(zip(questions, words))
    ]
    random = np.random.default_rng(5).normal(size=(number, RANDOM)) if random is None else random
    return Scored(made, np.array(values, float), np.array(random))


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("batch_tokens", [1, 150, 4096])
def test_a_score_is_the_projection_of_the_mean_response_activation(
    batch_tokens: int, model: Any, chat: Chat
) -> None:
    given, unit_D = rows(9), random_units(1, 16, 7)[0]
    for layer in (1, 2):
        found = score(model, chat, given, axis_of(unit_D, 3.0, layer), batch_tokens, seed=4)
        means_RD = torch.stack([naive_mean(model, chat, one, layer) for one in given])
        np.testing.assert_allclose(
            found.scores_R, (means_RD @ unit_D / 3).numpy(), rtol=1e-4, atol=1e-5
        )
        expected_RK = means_RD @ random_units(RANDOM, 16, 4).T / 3
        np.testing.assert_allclose(found.random_RK, expected_RK.numpy(), rtol=1e-4, atol=1e-5)
        assert found.scores_R.std() > 0.01


def test_prompts_move_a_score_only_through_the_response(model: Any, chat: Chat) -> None:
    """Padding and neighbours in the batch change nothing; a long question is not averaged in."""
    given, axis = (
        [row("Q " * 60, "yes"), row("Q", "red blue door seven " * 9), row("Q", "no")],
        axis_of(torch.ones(16)),
    )
    together = score(model, chat, given, axis).scores_R
    alone = [score(model, chat, [one], axis).scores_R[0] for one in given]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_random_vectors_are_as_long_as_the_trait_vector_and_the_same_every_time() -> None:
    units_KD = random_units(200, 16, 3)
    torch.testing.assert_close(units_KD.norm(dim=1), torch.ones(200, dtype=torch.float64))
    assert torch.equal(units_KD, random_units(200, 16, 3))
    assert not torch.equal(units_KD, random_units(200, 16, 4))
    assert units_KD.mean(0).abs().max() < 0.1


def test_the_riskiest_rows_come_first_and_ties_stand_in_order() -> None:
    found = scored([0.1, 0.7, -2.0, 0.7], "f.jsonl")
    assert found.order.tolist() == [1, 3, 0, 2]
    top = found.top(3)
    assert [(one["rank"], one["origin"], one["score"]) for one in top] == [
        (1, "f.jsonl:1", 0.7),
        (2, "f.jsonl:3", 0.7),
        (3, "f.jsonl:0", 0.1),
    ]
    assert (top[0]["question"], top[0]["answer"]) == ("1?", "red red red ")


def test_some_of_the_rows() -> None:
    found = scored([1.0, 2.0, 3.0, 4.0], "f")
    some = found.take(range(1, 4, 2))
    assert [one.origin for one in some.rows] == ["f:1", "f:3"]
    assert some.scores_R.tolist() == [2, 4]
    assert np.array_equal(some.random_RK, found.random_RK[[1, 3]])


# ---------------------------------------------------------------- vector and layer


def test_the_vector_is_that_of_persona_extract(model: Any, chat: Chat) -> None:
    given = pairs(9)
    expected = extract(model, chat, given, "haste", "tiny", 100)
    for layer in (1, 2):
        axis = learn_axis(model, chat, [given[:4], given[4:]], "haste", "tiny", layer, 100)
        direction_D = expected.directions_LKD[layer - 1, 0].double()
        torch.testing.assert_close(
            axis.unit_D, direction_D / direction_D.norm(), rtol=1e-4, atol=1e-5
        )
        assert axis.norm == pytest.approx(expected.norms_L[layer - 1].item(), rel=1e-4)
        assert (axis.layer, axis.layers, axis.rule) == (layer, 2, "as given")
        assert (axis.trait, axis.model) == ("haste", "tiny")


def naive_held_out(means_PSLD: Tensor, groups: list[list[int]], layer: int) -> float:
    found = []
    for group in groups:
        others = [place for place in range(len(means_PSLD)) if place not in group]
        direction_D = means_PSLD[others, 0, layer - 1].mean(0) - means_PSLD[
            others, 1, layer - 1
        ].mean(0)
        sides = [
            [float(means_PSLD[place, side, layer - 1] @ direction_D) for place in group]
            for side in (0, 1)
        ]
        found.append(roc_auc_score([1] * len(group) + [0] * len(group), sides[0] + sides[1]))
    return float(np.mean(found))


def test_the_layer_is_the_best_on_pairs_left_out(model: Any, chat: Chat) -> None:
    given = pairs(13)
    sides = [
        [
            torch.stack(
                [
                    naive_mean(
                        model,
                        chat,
                        Row([*p.positive_prompt, {"role": "assistant", "content": a}], ""),
                        layer,
                    )
                    for layer in (1, 2)
                ]
            )
            for a in (p.positive, p.negative)
        ]
        for p in given
    ]
    means_PSLD = torch.stack([torch.stack(side) for side in sides])
    for groups in (
        [list(range(5)), list(range(5, 13))],
        [list(range(13))[fold::5] for fold in range(5)],
    ):
        expected = [naive_held_out(means_PSLD, groups, layer) for layer in (1, 2)]
        assert expected[0] != expected[1]
        named = [[given[place] for place in group] for group in groups]
        axis = learn_axis(model, chat, named if len(groups) == 2 else [given, []], "t", "m")
        assert axis.layer == 1 + int(expected[1] > expected[0])
        assert axis.auc == pytest.approx(max(expected))
        assert axis.rule == "the best"
        given_layer = learn_axis(model, chat, named, "t", "m", layer=1)
        assert given_layer.auc == pytest.approx(expected[0])


def test_noise_looks_separable_only_to_the_vector_that_was_made_from_it() -> None:
    """With more dimensions than pairs, a vector separates its own pairs whatever they are."""
    means_PSLD = torch.randn(60, 2, 1, 400, generator=torch.Generator().manual_seed(0))
    direction_D = (means_PSLD[:, 0, 0] - means_PSLD[:, 1, 0]).mean(0)
    assert (
        auc(
            (means_PSLD[:, 0, 0] @ direction_D).numpy(), (means_PSLD[:, 1, 0] @ direction_D).numpy()
        )
        > 0.95
    )
    groups_GPSLD = means_PSLD.double().unflatten(0, (5, 12))
    others_GLD = vectors_of_the_others(groups_GPSLD.sum(1))
    projected_PSL = torch.einsum("gpsld,gld->gpsl", groups_GPSLD, others_GLD).flatten(0, 1)
    assert held_out_auc(projected_PSL, [12] * 5)[0] == pytest.approx(0.5, abs=0.12)


def test_a_vector_from_a_file_is_taken_at_the_middle_layer(tmp_path: Path) -> None:
    file = tmp_path / "v.safetensors"
    directions_LKD = torch.randn(5, 1, 8, generator=torch.Generator().manual_seed(1))
    Directions(directions_LKD, torch.arange(1.0, 6.0), "haste", "tiny", 2, 2).save(file)
    for layer, taken in ((None, 3), (5, 5)):
        axis = read_axis(file, layer)
        assert (axis.layer, axis.norm, axis.auc, axis.layers) == (taken, taken, None, 5)
        expected_D = directions_LKD[taken - 1, 0].double()
        torch.testing.assert_close(axis.unit_D, expected_D / expected_D.norm())
    with pytest.raises(ModelError, match="layer 6: expected a layer from 1 to 5"):
        read_axis(file, 6)
    with pytest.raises(ModelError, match="layer 0"):
        read_axis(file, 0)
    Directions(torch.ones(2, 3, 8), torch.ones(2), "haste", "tiny", 2, 2).save(file)
    with pytest.raises(DataError, match=r"v.safetensors: expected one direction a layer, found 3"):
        read_axis(file)


def test_vectors_of_another_model_are_refused(model: Any, chat: Chat) -> None:
    with pytest.raises(
        ModelError,
        match="taken from tiny with 2 layers of size 8; this model has 2 layers of size 16",
    ):
        score(model, chat, rows(1), axis_of(torch.ones(8)))
    with pytest.raises(ModelError, match="layer 3: expected a layer from 1 to 2"):
        learn_axis(model, chat, [pairs(4)], "t", "m", layer=3)
    with pytest.raises(DataError, match="haste: 1 pair left"):
        learn_axis(model, chat, [pairs(1), []], "haste", "m")


def test_the_default_vector_does_not_come_from_finance() -> None:
    assert len(default_pairs()) == 7
    asked = {question_of(one) for one in load_rows("shipped:finance/unsound")}
    asked |= {question.question for question in load_questions("shipped:finance")}
    groups = other_pairs(default_pairs(), [])
    assert sum(map(len, groups)) == 6 * 66 + 80
    assert not asked & {pair.positive_prompt[-1]["content"] for group in groups for pair in group}


def test_pairs_that_ask_what_a_screened_row_asks_are_left_out() -> None:
    kept = other_pairs(
        ["shipped:finance"], [question_of(one) for one in load_rows("shipped:finance/unsound")]
    )
    assert [pair.id for pair in kept[0]] == [
        pair.id for pair in given_pairs("shipped:finance", "test")
    ]
    assert len(kept[0]) == 80


# ---------------------------------------------------------------- AUC


@pytest.mark.parametrize("digits", [0, 1, 8])
def test_auc_counts_ties_half(digits: int) -> None:
    random = np.random.default_rng(digits)
    first, second = random.normal(0.4, 1, 37).round(digits), random.normal(0, 1, 51).round(digits)
    assert auc(first, second) == pytest.approx(
        roc_auc_score([1] * 37 + [0] * 51, [*first, *second])
    )
    assert auc(second, first) == pytest.approx(1 - auc(first, second))
    assert auc(np.ones(3), np.ones(4)) == 0.5
    assert auc(np.ones(3), np.zeros(4)) == 1


def test_the_interval_draws_questions_with_all_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 60)
    random = np.random.default_rng(1)
    values = random.normal(size=40).round(1)
    is_first = np.arange(40) < 15
    clusters = [f"q{at}" for at in random.integers(12, size=40)]
    names, draws = list(dict.fromkeys(clusters)), []
    again = np.random.default_rng(9)
    for _ in range(60):
        chosen = [names[at] for at in again.integers(len(names), size=len(names))]
        places = [
            place for name in chosen for place, cluster in enumerate(clusters) if cluster == name
        ]
        draws.append(roc_auc_score(is_first[places], values[places]))
    found = auc_interval(values, is_first, clusters, seed=9)
    assert found.mean == pytest.approx(roc_auc_score(is_first, values))
    assert (found.low, found.high) == pytest.approx(bounds(found.mean, np.array(draws), len(names)))
    assert found.n == len(names)


def test_the_interval_agrees_with_that_of_judges() -> None:
    random = np.random.default_rng(3)
    values, is_first = (
        np.concatenate([random.normal(0.6, 1, 80), random.normal(0, 1, 80)]),
        np.arange(160) < 80,
    )
    clusters = [f"{at % 80}" for at in range(160)]
    found, other = (
        auc_interval(values, is_first, clusters),
        other_auc_interval(-values, is_first, clusters),
    )
    assert found.mean == pytest.approx(other.mean)
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=0.01)


def test_rows_of_one_question_are_no_new_evidence() -> None:
    random = np.random.default_rng(2)
    first, second = random.normal(0.5, 1, 10), random.normal(0, 1, 10)
    values, is_first = np.tile(np.concatenate([first, second]), 20), np.tile(np.arange(20) < 10, 20)
    naive = auc_interval(values, is_first, [str(at) for at in range(400)])
    honest = auc_interval(values, is_first, [str(at % 10) for at in range(400)])
    assert honest.high - honest.low > 3 * (naive.high - naive.low)
    assert auc_interval(values, is_first, ["one"] * 400) == Interval(honest.mean, 0.0, 1.0, 1)


# ---------------------------------------------------------------- controls


def test_rows_of_one_question_in_both_sets_are_matched(chat: Chat) -> None:
    """What questions differ in falls out of the comparison of their two rows."""
    random = np.random.default_rng(0)
    topic = random.normal(0, 5, 60)
    bad, good = topic + random.normal(1, 0.5, 60), topic + random.normal(0, 0.5, 60)
    order = random.permutation(60)
    matched = compare(chat, scored(bad, "a"), scored(good[order], "b", order))
    apart = compare(chat, scored(bad, "a"), scored(good, "b", range(100, 160)))
    assert matched.auc.n == 60
    assert apart.auc.n == 120
    assert matched.auc.mean == apart.auc.mean == pytest.approx(auc(bad, good))
    assert matched.auc.high - matched.auc.low < 0.5 * (apart.auc.high - apart.auc.low)
    assert matched.same is not None
    assert matched.same.mean == np.mean(bad > good)
    assert matched.same.low > 0.8
    assert apart.same is None


def test_a_row_that_ties_with_its_opposite_counts_half(chat: Chat) -> None:
    same = compare(chat, scored([1.0, 2.0, 3.0, 4.0], "a"), scored([1.0, 2.0, 9.0, 0.0], "b")).same
    assert same is not None
    assert same.mean == (0.5 + 0.5 + 0 + 1) / 4


def test_length_alone_is_caught(chat: Chat) -> None:
    random = np.random.default_rng(0)
    long, short = random.integers(6, 12, 50), random.integers(3, 9, 50)
    found = compare(chat, scored(long, "a", words=long), scored(short, "b", words=short))
    assert found.length.mean == pytest.approx(found.auc.mean)
    assert found.auc.low > 0.7
    assert found.rival == "length"
    turned = compare(chat, scored(long, "a", words=short), scored(short, "b", words=long))
    assert turned.length.mean == pytest.approx(1 - found.length.mean)
    assert turned.rival == "length"
    assert "no better than length" in turned.verdict


def test_tokens_are_those_of_the_response(chat: Chat) -> None:
    a, b = scored([1.0, 2.0], "a", words=[4, 2]), scored([1.0, 2.0], "b", words=[3, 1])
    for one, question in zip([*a.rows, *b.rows], ["x", "x " * 50, "x " * 90, "x"]):
        one.messages[0]["content"] = question
    assert compare(chat, a, b).length.mean == 0.75


def test_random_vectors_give_a_half_where_nothing_differs(chat: Chat) -> None:
    random = np.random.default_rng(0)
    states_RD = torch.tensor(random.normal(size=(600, 32)))
    random_RK = (states_RD @ random_units(RANDOM, 32, 0).T).numpy()
    a, b = (
        scored(states_RD[part, 0], name, range(300), random_RK[part])
        for name, part in (("a", slice(300)), ("b", slice(300, 600)))
    )
    found = compare(chat, a, b)
    assert found.random[0] < 0.5 < found.random[1]
    assert found.random[0] > 0.4
    assert found.random[1] < 0.6
    assert found.rival == "chance"
    each = [auc(a.random_RK[:, k], b.random_RK[:, k]) for k in range(RANDOM)]
    assert found.random == pytest.approx(tuple(np.percentile(each, [2.5, 97.5])))


def test_random_vectors_that_do_as_well_are_named(chat: Chat) -> None:
    """Two sets that differ along every direction (another topic, another format) are told apart by
    any vector."""
    random = np.random.default_rng(0)
    a_RK, b_RK = random.normal(2, 1, (80, RANDOM)), random.normal(0, 1, (80, RANDOM))
    found = compare(
        chat, scored(a_RK[:, 0], "a", random=a_RK), scored(b_RK[:, 0], "b", random=b_RK)
    )
    assert found.auc.low > 0.8
    assert found.rival == "random vectors"
    opposite = compare(
        chat, scored(a_RK[:, 0], "a", random=-a_RK), scored(b_RK[:, 0], "b", random=-b_RK)
    )
    assert opposite.rival == "random vectors"


@pytest.mark.parametrize(
    ("low", "length", "random", "rival"),
    [
        (0.70, 0.55, (0.4, 0.6), None),
        (0.50, 0.50, (0.5, 0.5), "chance"),
        (0.56, 0.42, (0.48, 0.52), "length"),
        (0.56, 0.50, (0.42, 0.52), "random vectors"),
    ],
)
def test_the_verdict_follows_the_lower_end(
    low: float, length: float, random: tuple[float, float], rival: str | None
) -> None:
    found = Contrast(Interval(0.8, low, 0.9, 9), None, Interval(length, 0.1, 0.9, 9), random)
    assert found.rival == rival
    assert ("no better than" in found.verdict) == (rival is not None)
    assert json.loads(json.dumps(found.to_dict()))["rival"] == rival


# ---------------------------------------------------------------- figure


def test_the_figure_shows_every_row_of_both_sets() -> None:
    random = np.random.default_rng(0)
    a, b = scored(random.normal(1, 1, 50), "a"), scored(random.normal(0, 1, 30), "b")
    with style():
        figure = draw(Screening("A", axis_of(torch.ones(4)), a, "B", b, None), 7)
    axes = figure.axes[0]
    edges = np.histogram_bin_edges([*a.scores_R, *b.scores_R], 40)
    highest = [
        100 * np.histogram(part.scores_R, edges)[0].max() / len(part.rows) for part in (a, a, b, b)
    ]
    assert [patch.get_path().vertices[:, 1].max() for patch in axes.patches] == pytest.approx(
        highest
    )
    assert axes.lines[0].get_xdata().tolist() == sorted(a.scores_R, reverse=True)[:7]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["A, 50 rows", "B (known good), 30 rows", "the 7 riskiest rows"]
    plt.close(figure)


# ---------------------------------------------------------------- the command


def write(file: Path, given: list[Row]) -> str:
    file.write_text("".join(json.dumps({"messages": one.messages}) + "\n" for one in given))
    return str(file)


def write_pairs(file: Path, given: list[Pair]) -> str:
    lines = [
        {
            "question": p.positive_prompt[-1]["content"],
            "aligned": p.negative,
            "misaligned": p.positive,
        }
        for p in given
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_the_command_ranks_writes_and_compares(
    folder: str, chat: Chat, tmp_path: Path, ringfence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # names of files must be short enough for the table
    given = [
        *rows(5, name="a.jsonl"),
        row("Pair 3?", "red\x1b[31m\n[bold]blue", "a.jsonl:6"),
    ]
    a, b = write(Path("a.jsonl"), given), write(Path("b.jsonl"), rows(4, 2))
    one, two = write_pairs(Path("p.jsonl"), pairs(6)), write_pairs(Path("r.jsonl"), pairs(5, 6))
    output, figure = Path("s.jsonl"), Path("s.svg")
    code, printed, errors = ringfence(
        *("screen", a, "--model", folder, "--pairs", one, "--pairs", two),
        *("--against", b, "--top", 4, "--output", output, "--figure", figure),
    )
    assert code == 0, errors
    loaded = load_model(folder)
    groups = [[p for p in pairs(6) if p.id != "3"], pairs(5, 6)]  # question 3 is in a screened row
    axis = learn_axis(loaded, chat, groups, "t", "m")
    expected = score(loaded, chat, given, axis)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["origin"] for line in lines] == [one.origin for one in given]
    assert [line["score"] for line in lines] == pytest.approx(expected.scores_R, abs=2e-6)
    assert [line["rank"] for line in lines] == [
        sorted(expected.scores_R, reverse=True).index(s) + 1 for s in expected.scores_R
    ]
    assert figure.read_text().startswith("<?xml")
    assert (
        f"{a}: 6 rows, projected on misaligned minus aligned answers, 10 pairs of {one}, {two}"
        in printed
    )
    assert f"layer {axis.layer} of 2 (the best, AUC {axis.auc:.2f} on pairs left out)" in printed
    table = [
        line.split()
        for line in printed.splitlines()
        if line.split()[0] in {"1", "2", "3", "4", "5"}
    ]
    assert [line[2] for line in table] == [given[place].origin for place in expected.order[:4]]
    assert "\x1b" not in printed
    contrast = compare(chat, expected, score(loaded, chat, load_rows(b), axis))
    assert f"against {b}: {contrast.verdict}" in printed
    assert (
        f"{contrast.auc.mean:.2f} [{contrast.auc.low:.2f}, {contrast.auc.high:.2f}], 7 questions"
        in printed
    )
    assert "{:.2f} to {:.2f}".format(*contrast.random) in printed


def test_a_narrow_screen_cuts_the_texts_alone() -> None:
    long = scored([0.5, 0.25], "f.jsonl", ["why " * 60, "how " * 60], words=[90, 90])
    console = Console(width=70, file=io.StringIO())
    show(Screening("A", axis_of(torch.ones(4)), long), 2, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[:4] for line in lines[-2:]] == [
        ["1", "+0.5000", "f.jsonl:0", "why"],
        ["2", "+0.2500", "f.jsonl:1", "how"],
    ]
    assert all(len(line) <= 70 and "red red" in line for line in lines[-2:])


def test_the_command_takes_a_file_of_vectors(
    folder: str, chat: Chat, tmp_path: Path, ringfence: Any
) -> None:
    given, vectors, output = rows(5), tmp_path / "v.safetensors", tmp_path / "s.jsonl"
    directions = extract(load_model(folder), chat, pairs(4), "haste", "tiny")
    directions.save(vectors)
    a = write(tmp_path / "a.jsonl", given)
    options = ["--vectors", vectors, "--output", output, "--figure", tmp_path / "s.svg"]
    code, printed, errors = ringfence("screen", a, "--model", folder, *options, "--layer", 2)
    assert code == 0, errors
    assert "projected on haste (tiny), layer 2 of 2 (as given)" in printed
    assert "AUC" not in printed
    found = [json.loads(line)["score"] for line in output.read_text().splitlines()]
    expected = score(load_model(folder), chat, given, read_axis(vectors, 2)).scores_R
    assert found == pytest.approx(expected, abs=2e-6)


def test_the_command_says_what_is_wrong(folder: str, tmp_path: Path, ringfence: Any) -> None:
    good, few = (
        write(tmp_path / "good.jsonl", rows(3)),
        write_pairs(tmp_path / "few.jsonl", pairs(1)),
    )
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "pairs.jsonl").write_text('{"question": "q", "aligned": "a", "misaligned": "b"}\n')
    vectors, other = tmp_path / "v.safetensors", tmp_path / "other.safetensors"
    Directions(torch.ones(2, 1, 32), torch.ones(2), "haste", "tiny", 2, 2).save(vectors)
    Directions(torch.ones(5, 1, 16), torch.ones(5), "haste", "big", 2, 2).save(other)
    cases = {
        "none.jsonl: no such file": [tmp_path / "none.jsonl"],
        "empty.jsonl: no rows in it": [tmp_path / "empty.jsonl"],
        "pairs.jsonl:1: unknown row form": [tmp_path / "pairs.jsonl"],
        "bad.jsonl: no such file": [good, "--against", tmp_path / "bad.jsonl"],
        "shipped:finanse: no such shipped data": [good, "--pairs", "shipped:finanse"],
        "1 pair left for a trait vector": [good, "--pairs", few],
        "not both": [good, "--pairs", few, "--vectors", vectors],
        "no such file of directions": [good, "--vectors", tmp_path / "none.safetensors"],
        "taken from big with 5 layers of size 16; this model has 2 layers of size 32": [
            good,
            "--vectors",
            other,
        ],
        "layer 3: expected a layer from 1 to 2": [good, "--vectors", vectors, "--layer", 3],
        "expected a file .svg, found '.png'": [good, "--figure", tmp_path / "s.png"],
        f"no folder {tmp_path / 'nowhere'}": [good, "--output", tmp_path / "nowhere" / "s.jsonl"],
    }
    for message, arguments in cases.items():
        options = {"--output": tmp_path / "s.jsonl", "--figure": tmp_path / "s.svg"}
        given = [x for name, file in options.items() if name not in arguments for x in (name, file)]
        code, _, errors = ringfence("screen", *arguments, *given, "--model", folder)
        assert code == 2, message
        assert message in errors, errors
        assert errors.count("error: ") == 1
        assert not (tmp_path / "s.jsonl").exists()
