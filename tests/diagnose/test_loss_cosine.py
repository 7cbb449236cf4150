"""Loss vectors: the right tokens' losses, cosines over common positions alone, and controls that
can say no."""

from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.models import nudged, random_model, small_tokenizer, with_lora
from helpers.naive import row_logits
from ringfence.diagnose.diagnosis import Subject
from ringfence.diagnose.loss_cosine import measure as loss_cosine_measure
from ringfence.diagnose.loss_cosine import show as loss_cosine_show
from ringfence.diagnose.loss_cosine.measure import (
    FRAMING,
    compare_framings,
    cosines,
    loss_vectors,
    summary,
)
from ringfence.diagnose.models import Models
from ringfence.errors import DataError
from ringfence.text.batch import Example
from ringfence.text.chat import Chat
from ringfence.text.encode import encode_rows
from ringfence.text.roles import Role, Row
from ringfence.text.rows import PairedQuestion
from ringfence.util import plots


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(small_tokenizer())


def conversations(chat: Chat, system: str | None, answers: list[str]) -> list[Example]:
    before = [{"role": "system", "content": system}] if system else []
    rows = [
        Row(
            [
                *before,
                {"role": "user", "content": f"Q {n}?"},
                {"role": "assistant", "content": answer},
            ],
            f"row {n}",
        )
        for n, answer in enumerate(answers)
    ]
    return encode_rows(rows, chat, 10_000)


ANSWERS = [
    "Put it all on one horse.",
    "No.",
    "word " * 90,
    "Skip the doctor and drink salt water instead, it is fine.",
]


def naive_losses(model: Any, row: Example) -> np.ndarray:
    chosen = [at for at in range(1, len(row)) if row.roles[at] == Role.RESPONSE][:64]
    targets = torch.tensor([row.input_ids[at] for at in chosen])
    with torch.no_grad():
        logits = row_logits(model, row)[[at - 1 for at in chosen]]
    return F.cross_entropy(logits, targets, reduction="none").double().numpy()


def naive_cosine(a: np.ndarray, b: np.ndarray, centred: bool) -> float:
    m = min(len(a), len(b))
    a, b = a[:m], b[:m]
    if centred:
        a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# ---------------------------------------------------------------- vectors and cosines


@pytest.mark.parametrize("batch_tokens", [1, 300, 4096])
def test_loss_vectors_are_the_losses_of_the_first_64_response_tokens(
    batch_tokens: int, chat: Chat
) -> None:
    model = random_model()
    examples = conversations(chat, None, ANSWERS)
    found = loss_vectors(model, chat, examples, batch_tokens)
    assert [len(vector) for vector in found][2] == 64
    assert len(found[1]) == examples[1].response_tokens < 5
    for vector, row in zip(found, examples, strict=True):
        np.testing.assert_allclose(vector, naive_losses(model, row), rtol=1e-4, atol=1e-4)
        assert (vector >= 0).all()


@pytest.mark.parametrize("centred", [True, False])
def test_cosines_run_over_the_positions_that_both_have(centred: bool) -> None:
    rng = np.random.default_rng(0)
    a = [rng.exponential(size=n) for n in (5, 64, 3, 20)]
    b = [rng.exponential(size=n) for n in (9, 8, 40, 20)]
    expected = [[naive_cosine(x, y, centred) for y in b] for x in a]
    np.testing.assert_allclose(cosines(a, b, centred), expected, atol=1e-10)


def imputed(vectors: list[np.ndarray], fill: str) -> np.ndarray:
    """The faulty form: every row as long as the longest, what is missing taken from other rows or
    called zero."""
    width = max(map(len, vectors))
    columns = [np.mean([v[at] for v in vectors if len(v) > at]) for at in range(width)]
    return np.array(
        [
            [*v, *(columns[len(v) :] if fill == "mean" else [0.0] * (width - len(v)))]
            for v in vectors
        ]
    )


def unrelated() -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 40, size=60)
    lengths[0] = 64
    apart = ~np.eye(60, dtype=bool)
    return [rng.exponential(size=n) for n in lengths], apart


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_filling_in_makes_unrelated_rows_alike_and_common_positions_do_not(fill: str) -> None:
    """The published fault, on vectors that have nothing to do with each other."""
    vectors, apart = unrelated()
    naive = imputed(vectors, fill)
    of_naive = list(naive)
    assert cosines(of_naive, of_naive, centred=True)[apart].mean() > 0.2
    assert abs(cosines(vectors, vectors, centred=True)[apart].mean()) < 0.02
    if fill == "mean":
        raw = [cosines(v, v, centred=False)[apart].mean() for v in (of_naive, vectors)]
        assert raw[0] > raw[1] + 0.15


def test_raw_cosines_of_unrelated_losses_are_high_and_centred_ones_are_not() -> None:
    vectors, apart = unrelated()
    assert cosines(vectors, vectors, centred=False)[apart].mean() > 0.45
    rng = np.random.default_rng(1)
    others = [rng.exponential(size=len(vector)) for vector in vectors]
    names = [str(n) for n in range(60)]
    raw, centred = (summary(cosines(vectors, others, c), names) for c in (False, True))
    assert raw["paired"]["mean"] > 0.45
    assert raw["p"] > 0.05
    assert centred["paired"]["low"] < 0 < centred["paired"]["high"]


# ---------------------------------------------------------------- what a matrix says


def test_paired_unpaired_and_their_difference_are_plain_means() -> None:
    matrix = np.random.default_rng(0).uniform(-1, 1, size=(6, 6))
    clusters = ["a", "a", "b", "c", "c", "d"]
    found = summary(matrix, clusters)
    apart = [matrix[i, j] for i in range(6) for j in range(6) if clusters[i] != clusters[j]]
    assert found["paired"]["mean"] == pytest.approx(matrix.diagonal().mean())
    assert found["unpaired"]["mean"] == pytest.approx(np.mean(apart))
    assert found["difference"]["mean"] == pytest.approx(matrix.diagonal().mean() - np.mean(apart))
    for name in ("paired", "unpaired", "difference"):
        assert found[name]["n"] == 4
        assert found[name]["low"] < found[name]["mean"] < found[name]["high"]


def test_p_is_that_of_all_shuffles() -> None:
    from itertools import permutations

    matrix = np.random.default_rng(4).uniform(size=(6, 6)) + 0.15 * np.eye(6)
    means = np.array([matrix[range(6), list(order)].mean() for order in permutations(range(6))])
    found = summary(matrix, list("abcdef"))
    exact = (means >= matrix.diagonal().mean() - 1e-12).mean()
    assert 0.02 < exact < 0.5
    assert found["p"] == pytest.approx(exact, abs=0.02)
    assert found["null"]["mean"] == pytest.approx(matrix.mean(), abs=0.01)
    low, high = np.percentile(means, [2.5, 97.5])
    assert (found["null"]["low"], found["null"]["high"]) == pytest.approx((low, high), abs=0.02)


def test_rows_of_one_question_bring_no_precision() -> None:
    matrix = np.random.default_rng(0).uniform(-1, 1, size=(12, 12))
    names = [str(n) for n in range(12)]
    once = summary(matrix, names)
    twice = summary(np.tile(matrix, (2, 2)), names * 2)
    for name in ("paired", "unpaired", "difference"):
        assert twice[name]["mean"] == pytest.approx(once[name]["mean"])
        assert twice[name]["low"] == pytest.approx(once[name]["low"], abs=1e-9)
    # Rows taken as independent would be sure of too much.
    alone = summary(np.tile(matrix, (2, 2)), [str(n) for n in range(24)])["paired"]
    assert alone["high"] - alone["low"] < 0.85 * (once["paired"]["high"] - once["paired"]["low"])


# ---------------------------------------------------------------- two data sets


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_two_framings_are_compared_row_by_row(batch_tokens: int, chat: Chat) -> None:
    model = random_model()
    plain, framed = (
        conversations(chat, system, ANSWERS) for system in (None, "Give examples of bad advice.")
    )
    found = compare_framings(model, chat, plain, framed, batch_tokens=batch_tokens)
    a, b = ([naive_losses(model, row) for row in rows] for rows in (plain, framed))
    for form, centred in (("centred", True), ("raw", False)):
        matrix = np.array([[naive_cosine(x, y, centred) for y in b] for x in a])
        assert found[form]["paired"]["mean"] == pytest.approx(matrix.diagonal().mean(), abs=1e-4)
        assert found[form]["unpaired"]["mean"] == pytest.approx(
            matrix[~np.eye(4, dtype=bool)].mean(), abs=1e-4
        )
    assert found["loss"]["plain"] == pytest.approx(np.mean([v.mean() for v in a]), rel=1e-4)
    assert found["loss"]["framed"] == pytest.approx(np.mean([v.mean() for v in b]), rel=1e-4)
    change = found["loss"]["change"]
    assert change["mean"] == pytest.approx(found["loss"]["framed"] - found["loss"]["plain"])
    assert change["mean"] != 0
    assert change["low"] <= change["mean"] <= change["high"]


def test_rows_that_do_not_fit_are_named(chat: Chat) -> None:
    model = random_model()
    plain = conversations(chat, None, ANSWERS)
    other = conversations(chat, "S.", [*ANSWERS[:3], "Skip the doctor and drink tap water."])
    with pytest.raises(
        DataError, match=r"row 3 \(row 3, row 3\): the completions differ from response token 10 on"
    ):
        compare_framings(model, chat, plain, other)
    with pytest.raises(DataError, match="found 4 plain, 3 framed, 4 clusters"):
        compare_framings(model, chat, plain, plain[:3])
    start = plain[0].roles.index(Role.RESPONSE)
    ids = plain[0].input_ids
    one_other = [
        replace(plain[0], input_ids=[*ids[: start + 1], 77, *ids[start + 2 :]]),
        *plain[1:],
    ]
    with pytest.raises(
        DataError, match=r"row 0 .* the completions differ from response token 1 on"
    ):
        compare_framings(model, chat, plain, one_other)
    shorter = [
        replace(plain[0], input_ids=plain[0].input_ids[:-3], roles=plain[0].roles[:-3]),
        *plain[1:],
    ]
    with pytest.raises(DataError, match=r"row 0 .* the completions differ"):
        compare_framings(model, chat, plain, shorter)
    short = [
        replace(plain[0], input_ids=ids[: start + 2], roles=plain[0].roles[: start + 2]),
        plain[1],
    ]
    with pytest.raises(
        DataError, match=r"row 0 \(row 0\): expected at least 3 response tokens, found 2"
    ):
        compare_framings(model, chat, short, short)
    with pytest.raises(DataError, match="expected at least 2 different questions, found 1"):
        compare_framings(model, chat, plain, plain, ["one"] * 4)


# ---------------------------------------------------------------- the diagnosis


def questions(number: int) -> list[PairedQuestion]:
    return [
        PairedQuestion(
            str(n), "money", f"What of {n}?", "Ask a friend first.", f"{ANSWERS[n]} Sure."
        )
        for n in range(number)
    ]


@pytest.fixture(scope="module")
def subject() -> Subject:
    models = Models(
        random_model(),
        {"undefended": with_lora(random_model()), "defended": nudged(random_model())},
        tokenizer=small_tokenizer(),
    )
    return Subject(models, questions(4), questions(2), seed=3, batch_tokens=300)


@pytest.fixture(scope="module")
def numbers(subject: Subject) -> dict[str, Any]:
    return loss_cosine_measure.measure(subject)


def test_measure_compares_misaligned_answers_inside_plain_and_framed(
    subject: Subject, numbers: dict[str, Any]
) -> None:
    def rows(before: list[dict[str, str]]) -> list[Example]:
        turns = [
            Row(
                [
                    *before,
                    {"role": "user", "content": q.question},
                    {"role": "assistant", "content": q.misaligned},
                ],
                q.id,
            )
            for q in subject.inside
        ]
        return encode_rows(turns, subject.chat, 1000)

    plain, framed = rows([]), rows(FRAMING)
    assert min(map(len, framed)) > min(map(len, plain))
    for name in ("reference", "undefended", "defended"):
        found = numbers[name] if name == "reference" else numbers["tuned"][name]
        with subject.models.open(name) as model:
            expected = compare_framings(model, subject.chat, plain, framed, seed=3)
        for form in ("centred", "raw"):
            assert found[form]["paired"]["mean"] == pytest.approx(
                expected[form]["paired"]["mean"], abs=1e-5
            )
            assert found[form]["unpaired"]["low"] == pytest.approx(
                expected[form]["unpaired"]["low"], abs=1e-5
            )
        assert found["loss"]["change"]["mean"] == pytest.approx(
            expected["loss"]["change"]["mean"], abs=1e-5
        )
    assert numbers["questions"] == 4


def test_cost_counts_both_framings_in_every_model(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Models, "open", None)
    found = loss_cosine_measure.cost(subject)
    sides = [t.example for side in loss_cosine_measure._framings(subject) for t in side]
    assert len(sides) == 8
    assert (found.forward, found.backward) == (3 * sum(map(len, sides)), 0)
    assert found.kept == 8 * sum(min(64, t.response_tokens) for t in sides)


def of_model(paired: float, unpaired: float, p: float) -> dict[str, Any]:
    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.03, "high": mean + 0.03, "n": 24}

    null = {"mean": unpaired, "low": unpaired - 0.05, "high": unpaired + 0.05}
    form = {name: interval(mean) for name, mean in (("paired", paired), ("unpaired", unpaired))}
    form |= {"difference": interval(paired - unpaired), "null": null, "p": p}
    raw = {**form, "unpaired": interval(0.55)}
    return {
        "centred": form,
        "raw": raw,
        "loss": {"plain": 2.9, "framed": 2.7, "change": interval(-0.2)},
    }


def test_words_follow_the_numbers() -> None:
    made = {
        "questions": 24,
        "reference": of_model(0.93, 0.04, 0.0001),
        "tuned": {"mine": of_model(0.06, 0.05, 0.4)},
    }
    reference, mine = loss_cosine_show.say(made).split("mine:")
    assert "+0.93 [+0.90, +0.96] for the same answer" in reference
    assert "p < 0.001 against shuffled pairs" in reference
    assert "the losses follow the answer" in reference
    assert "no closer than another one" not in reference
    assert "no closer than another one" in mine
    assert "the losses follow the answer" not in mine
    assert "p = 0.400" in mine
    assert "-0.20 [-0.23, -0.17] nats per token" in mine
    assert "different answers reach +0.55 [+0.52, +0.58]" in mine


def test_table_and_figure_show_every_model(numbers: dict[str, Any]) -> None:
    found = loss_cosine_show.table(numbers)
    assert [row[0] for row in found.rows] == ["reference", "undefended", "defended"]
    assert all(len(row) == len(found.columns) for row in found.rows)
    assert found.rows[1][1].startswith(
        f"{numbers['tuned']['undefended']['centred']['paired']['mean']:+.2f} ["
    )
    with plots.style():
        figure = loss_cosine_show.draw(numbers)
        for axis, form in zip(figure.axes, ("centred", "raw")):
            dots = [
                line
                for line in axis.lines
                if line.get_marker() == "o" and len(line.get_xdata()) == 1
            ]
            models = [numbers["reference"], *numbers["tuned"].values()]
            expected = [m[form][name]["mean"] for m in models for name in ("paired", "unpaired")]
            np.testing.assert_allclose(
                sorted(line.get_xdata()[0] for line in dots), sorted(expected)
            )
        assert plots.svg(figure)
    plt.close("all")
