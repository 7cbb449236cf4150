"""Erosion: fitted on one half of the questions and measured on the other, against naive
computations on single rows."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from helpers.activations import (
    CHAT,
    LAYERS,
    TOKENIZER,
    Named,
    naive_mean,
    noise,
    questions,
    subject,
)
from helpers.models import nudged, random_model, with_lora
from helpers.naive import residual_stream
from ringfence.diagnose.diagnosis import Numbers, Subject
from ringfence.diagnose.erosion import measure as erosion_measure
from ringfence.diagnose.erosion import show as erosion_show
from ringfence.diagnose.erosion.measure import alignment_directions, example_means, halves
from ringfence.diagnose.models import Models
from ringfence.diagnose.texts import SIDES, Text, pair_texts
from ringfence.errors import DataError, ModelError
from ringfence.model import activations
from ringfence.model.directions import Directions
from ringfence.stats import bounds, draws
from ringfence.text.roles import Role
from ringfence.util import plots

pytestmark = pytest.mark.slow


def tiny_models(**extra: Any) -> Models:
    """A base far from the reference; two tuned models, one of them an adapter."""
    reference = random_model(num_hidden_layers=LAYERS, **extra)
    base = nudged(copy.deepcopy(reference), seed=5, size=0.3)
    tuned = {
        "full": nudged(copy.deepcopy(reference), seed=6, size=0.03),
        "lora": with_lora(copy.deepcopy(reference), size=0.05),
    }
    return Models(reference, tuned, base, tokenizer=TOKENIZER)


# ---------------------------------------------------------------- the naive forms


def naive_bounds(
    statistic: Callable[[np.ndarray], float], count: int, seed: int = 0
) -> list[float]:
    """The interval of a statistic of drawn places, draw by draw."""
    found = np.array([statistic(places) for places in draws(count, seed)])
    return list(bounds(statistic(np.arange(count)), found, count))


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("batch_tokens", [64, 700])
def test_activations_are_those_of_single_rows(batch_tokens: int) -> None:
    texts = pair_texts(CHAT, questions(8))
    assert max(text.example.response_tokens for text in texts) > 80  # so 64 is a limit
    model = tiny_models().sources["lora"]
    found = {}
    for places, means_BLD, norms_BL in example_means(model, CHAT, texts, batch_tokens):
        assert means_BLD.dtype == torch.float32
        found |= dict(zip(places, zip(means_BLD, norms_BL)))
    assert sorted(found) == list(range(16))
    for place, text in enumerate(texts):
        np.testing.assert_allclose(
            found[place][0].numpy(), naive_mean(model, text), rtol=1e-4, atol=1e-4
        )
        chosen = [at for at, role in enumerate(text.example.roles) if role == Role.RESPONSE][:64]
        with torch.no_grad(), residual_stream(model.get_base_model()) as stream:
            model(input_ids=torch.tensor([text.example.input_ids]))
        norms_L = [float(state[chosen].norm(dim=-1).mean()) for state in stream[1:]]
        np.testing.assert_allclose(found[place][1].numpy(), norms_L, rtol=1e-4)


def test_one_layer_alone_is_that_layer() -> None:
    texts, model = pair_texts(CHAT, questions(4)), random_model(num_hidden_layers=LAYERS)
    (_, every_BLD, _), (_, third_B1D, norms_B1) = (
        next(example_means(model, CHAT, texts, 10_000, layers)) for layers in (None, [3])
    )
    assert third_B1D.shape[1] == norms_B1.shape[1] == 1
    torch.testing.assert_close(third_B1D[:, 0], every_BLD[:, 2])


def test_half_precision_is_summed_in_float32() -> None:
    """A bf16 sum of 64 tokens would be off by some percent."""
    texts = pair_texts(CHAT, questions(3))
    model = random_model(num_hidden_layers=LAYERS).bfloat16()
    for places, means_BLD, _ in example_means(model, CHAT, texts, 10_000):
        for place, mean_LD in zip(places, means_BLD):
            naive_LD = naive_mean(model, texts[place])
            assert np.abs(mean_LD.numpy() - naive_LD).max() < 0.02 * np.abs(naive_LD).max()
        assert means_BLD.dtype == torch.float32


def test_directions_are_differences_of_means(tmp_path: Path) -> None:
    models, texts = tiny_models(), pair_texts(CHAT, questions(7))
    found = alignment_directions(models, texts, 300)
    assert list(found) == list(SIDES)
    for side, directions in found.items():
        chosen = [text for text in texts if text.side == side]
        means = [
            np.mean([naive_mean(models.sources[name], text) for text in chosen], 0)
            for name in ("reference", "base")
        ]
        np.testing.assert_allclose(
            directions.directions_LKD[:, 0].numpy(), means[0] - means[1], atol=2e-4
        )
        assert (directions.positive, directions.negative, directions.layers) == (7, 7, LAYERS)
        directions.save(tmp_path / "v.safetensors")
        again = Directions.load(tmp_path / "v.safetensors")
        again.check(models.sources["lora"])
        torch.testing.assert_close(again.directions_LKD, directions.directions_LKD)
        assert ("misaligned" in again.trait) == (side == "misaligned")
    # norms: of the reference, token by token
    lengths = []
    for text in (text for text in texts if text.side == "aligned"):
        chosen_T = [at for at, role in enumerate(text.example.roles) if role == Role.RESPONSE][:64]
        with torch.no_grad(), residual_stream(models.sources["reference"]) as stream:
            models.sources["reference"](input_ids=torch.tensor([text.example.input_ids]))
        lengths.append([float(state[chosen_T].norm(dim=-1).mean()) for state in stream[1:]])
    np.testing.assert_allclose(found["aligned"].norms_L.numpy(), np.mean(lengths, 0), rtol=1e-4)


def test_directions_of_one_side_alone_and_of_unlike_numbers() -> None:
    models, texts = tiny_models(), pair_texts(CHAT, questions(6))
    # Rows alone: the same batches in both.
    both = alignment_directions(models, texts, batch_tokens=1)
    misaligned = [text for text in texts if text.side == "misaligned"]
    alone = alignment_directions(models, misaligned, batch_tokens=1)
    assert list(alone) == ["misaligned"]
    torch.testing.assert_close(
        alone["misaligned"].directions_LKD, both["misaligned"].directions_LKD
    )
    uneven = alignment_directions(models, [*misaligned, texts[1]], batch_tokens=1)
    torch.testing.assert_close(
        uneven["misaligned"].directions_LKD, both["misaligned"].directions_LKD
    )
    assert uneven["aligned"].positive == 1


# ---------------------------------------------------------------- the whole measure


def test_measure_equals_the_naive_form() -> None:
    """Every number again, from single unpadded rows and loops over bootstrap draws."""
    models = tiny_models()
    looked_at = subject(models, 20, seed=3, batch_tokens=400)
    numbers = erosion_measure.measure(looked_at)
    json.dumps(numbers, allow_nan=False)
    fit, held = halves(looked_at.questions, 3)
    means = {
        (name, half, side): np.stack(
            [naive_mean(models.sources[name], t) for t in pair_texts(CHAT, qs) if t.side == side]
        )
        for name in models.names
        for half, qs in (("fit", fit), ("held", held))
        for side in SIDES
    }
    first, last = numbers["middle"]
    assert (first, last) == (2, 3)
    assert all(gap["low"] > 0 for side in SIDES for gap in numbers["gap"][side][first - 1 : last])
    for name in models.tuned:
        found, headline = numbers["tuned"][name], {}
        for side in SIDES:
            v_LD = means["reference", "fit", side].mean(0) - means["base", "fit", side].mean(0)
            unit_LD = v_LD / np.linalg.norm(v_LD, axis=-1, keepdims=True)
            along = {m: (means[m, "held", side] * unit_LD).sum(-1) for m in models.names}
            lost_QL, gap_QL = along["reference"] - along[name], along["reference"] - along["base"]
            moved_LD = (means[name, "held", side] - means["reference", "held", side]).mean(0)
            for layer in range(LAYERS):
                gap = numbers["gap"][side][layer]
                np.testing.assert_allclose(gap["mean"], gap_QL[:, layer].mean(), rtol=1e-3)
                assert gap["n"] == 10
                np.testing.assert_allclose(
                    [gap["low"], gap["high"]],
                    naive_bounds(lambda at, g=gap_QL[:, layer]: g[at].mean(), 10, 3),
                    rtol=2e-3,
                    atol=1e-4,
                )
                point = found[side]["erosion"][layer]
                assert (point is None) == (gap["low"] <= 0)
                if point is not None:
                    expected = [
                        lost_QL[:, layer].sum() / gap_QL[:, layer].sum(),
                        *naive_bounds(
                            lambda at, t=lost_QL[:, layer], b=gap_QL[:, layer]: (
                                t[at].sum() / b[at].sum()
                            ),
                            10,
                            3,
                        ),
                    ]
                    np.testing.assert_allclose(
                        [point[k] for k in ("mean", "low", "high")], expected, atol=2e-3
                    )
                    rest_D = moved_LD[layer] - (moved_LD[layer] @ unit_LD[layer]) * unit_LD[layer]
                    np.testing.assert_allclose(
                        found[side]["across"][layer],
                        np.linalg.norm(rest_D) / gap_QL[:, layer].mean(),
                        rtol=2e-3,
                    )
                np.testing.assert_allclose(
                    numbers["projections"][name][side][layer],
                    along[name][:, layer].mean(),
                    rtol=1e-3,
                    atol=1e-3,
                )

            def summary(at: np.ndarray, t: np.ndarray = lost_QL, b: np.ndarray = gap_QL) -> float:
                return float(
                    np.mean([t[at, k].sum() / b[at, k].sum() for k in range(first - 1, last)])
                )

            headline[side] = summary
            np.testing.assert_allclose(
                [found[side]["headline"][k] for k in ("mean", "low", "high")],
                [summary(np.arange(10)), *naive_bounds(summary, 10, 3)],
                atol=2e-3,
            )
        np.testing.assert_allclose(
            [found["difference"][k] for k in ("mean", "low", "high")],
            [
                headline["misaligned"](np.arange(10)) - headline["aligned"](np.arange(10)),
                *naive_bounds(lambda at, h=headline: h["misaligned"](at) - h["aligned"](at), 10, 3),
            ],
            atol=3e-3,
        )


def test_a_share_of_the_way_back_is_that_share() -> None:
    """Layer 3 of the tuned model writes 30 % of the way from the reference's to the base's weights,
    and is the only one that differs: its output is linear in them."""
    reference = random_model(num_hidden_layers=LAYERS)
    base, tuned, onwards = (copy.deepcopy(reference) for _ in range(3))
    torch.manual_seed(4)
    step = 0.5 * torch.randn_like(reference.model.layers[2].mlp.down_proj.weight)
    with torch.no_grad():
        base.model.layers[2].mlp.down_proj.weight.add_(step)
        tuned.model.layers[2].mlp.down_proj.weight.add_(0.3 * step)
        onwards.model.layers[2].mlp.down_proj.weight.sub_(0.2 * step)
    numbers = erosion_measure.measure(
        subject(Models(reference, {"a": tuned, "b": onwards}, base, tokenizer=TOKENIZER), 16)
    )
    for side in SIDES:
        assert numbers["gap"][side][2]["low"] > 0
        for name, share in (("a", 0.3), ("b", -0.2)):
            found = numbers["tuned"][name][side]
            assert [found["erosion"][2][k] for k in ("mean", "low", "high")] == pytest.approx(
                [share] * 3, abs=1e-4
            )
            # Nothing differs there.
            assert found["erosion"][:2] == found["across"][:2] == [None, None]
            assert found["headline"] is None  # layer 2 is one of the middle half
    assert all(found["difference"] is None for found in numbers["tuned"].values())
    assert "Erosion is unknown" in erosion_show.say(numbers)
    with plots.style():
        plt.close(erosion_show.draw(numbers))


# ---------------------------------------------------------------- activations made by hand


States = Callable[[str, Text], np.ndarray]  # name of a model and a text -> [L, D]


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> Callable[[States], list[tuple[str, set[str]]]]:
    """Puts activations in place of models' own; gives the list of passes: name and questions."""

    def put(of: States) -> list[tuple[str, set[str]]]:
        passes: list[tuple[str, set[str]]] = []

        def means(
            model: Any, _chat: Any, texts: Sequence[Text], _tokens: int, _layers: Any = None
        ) -> Iterator[Any]:
            passes.append((model.name, {text.question for text in texts}))
            for start in range(0, len(texts), 5):
                places = list(range(start, min(start + 5, len(texts))))[::-1]
                means_BLD = torch.tensor(
                    np.stack([of(model.name, texts[place]) for place in places])
                ).float()
                yield places, means_BLD, means_BLD.norm(dim=-1)

        monkeypatch.setattr(erosion_measure, "example_means", means)
        return passes

    return put


def named(*tuned: str) -> Models:
    sources = {name: Named(name) for name in ("base", "reference", *tuned)}
    return Models(
        sources["reference"],
        {name: sources[name] for name in tuned},
        sources["base"],
        tokenizer=TOKENIZER,
    )


def standing(
    delta: float, shares: dict[str, dict[str, float]], seed: int = 0, spread: float = 1.0
) -> States:
    """Content of the text, `delta` along one axis between base and reference, the share of it that
    a tuned model lost on each side, and what each model makes of each text."""

    def of(name: str, text: Text) -> np.ndarray:
        content = 10 * noise(f"{seed} {text.question} {text.side}", 256)
        own = spread * noise(f"{seed} {name} {text.question} {text.side}", 256)
        along = {"base": 0.0, "reference": delta}.get(
            name, delta * (1 - shares.get(name, {}).get(text.side, 0.0))
        )
        axis = np.eye(256)[3 if text.side == "aligned" else 5]
        return np.stack([content + own + along * axis] * LAYERS)

    return of


def naive_same_text(of: States, looked_at: Subject, name: str) -> tuple[float, list[float]]:
    """The published form: the direction is fitted on the texts that it is measured on. With its
    interval."""
    texts = [text for text in pair_texts(CHAT, looked_at.questions) if text.side == "misaligned"]
    h = {
        model: np.stack([of(model, text)[0] for text in texts])
        for model in ("base", "reference", name)
    }
    v_D = (h["reference"] - h["base"]).mean(0)
    lost_Q, gap_Q = (h["reference"] - h[name]) @ v_D, (h["reference"] - h["base"]) @ v_D
    return lost_Q.sum() / gap_Q.sum(), naive_bounds(
        lambda at: lost_Q[at].sum() / gap_Q[at].sum(), len(texts)
    )


def test_fitting_on_the_measured_text_finds_erosion_where_there_is_none(states: Any) -> None:
    """The tuned model stands where the reference does, but for what each makes of each text. The
    direction contains the reference's own part of these texts, which the tuned model lacks: the
    naive form calls that erosion."""
    naive, ours, told = [], [], 0
    for seed in range(6):
        of = standing(6.0, {}, seed)
        states(of)
        looked_at = subject(named("tuned"), 12)
        share, (low, high) = naive_same_text(of, looked_at, "tuned")
        naive.append(share)
        told += not low <= 0 <= high
        numbers = erosion_measure.measure(looked_at)
        headline = numbers["tuned"]["tuned"]["misaligned"]["headline"]
        if headline is not None:
            ours.append(headline)
    assert np.mean(naive) > 0.2
    assert told >= 5
    assert len(ours) >= 3
    assert abs(np.mean([headline["mean"] for headline in ours])) < 0.1
    assert sum(headline["low"] <= 0 <= headline["high"] for headline in ours) >= len(ours) - 1


def test_a_base_that_is_the_reference_and_noise_has_nothing_to_erode(states: Any) -> None:
    """The naive form finds half of the way lost."""
    of = standing(0.0, {})
    states(of)
    looked_at = subject(named("tuned"), 12)
    _, (low, high) = naive_same_text(of, looked_at, "tuned")
    assert 0.3 < low < 0.5 < high < 0.7
    numbers = erosion_measure.measure(looked_at)
    assert numbers["tuned"]["tuned"]["misaligned"]["headline"] is None
    assert "Erosion is unknown" in erosion_show.say(numbers)
    assert erosion_show.table(numbers).rows == [["tuned", *["unknown"] * 5]]


@pytest.fixture
def five(states: Any) -> Numbers:
    """Tuned models that eroded on both sides alike, as published curves do, on misaligned text
    alone, more on aligned text, not at all, and the other way."""
    shares = {
        "alike": {"misaligned": 0.4, "aligned": 0.4},
        "apart": {"misaligned": 0.4, "aligned": 0.0},
        "reversed": {"misaligned": 0.1, "aligned": 0.5},
        "none": {},
        "onwards": {"misaligned": -0.3, "aligned": -0.3},
    }
    states(standing(40.0, shares))
    return erosion_measure.measure(subject(named(*shares), 24))


def test_the_control_decides_whether_erosion_is_specific(five: Numbers) -> None:
    """On misaligned text alone, `alike` and `apart` look the same."""
    assert [
        five["tuned"][name]["misaligned"]["headline"]["mean"] for name in ("alike", "apart")
    ] == pytest.approx([0.4, 0.4], abs=0.05)
    verdicts = {name: erosion_show.verdict(found) for name, found in five["tuned"].items()}
    assert verdicts == {
        "alike": "not specific to misaligned text",
        "apart": "specific to misaligned text",
        "reversed": "not specific to misaligned text",
        "none": "no erosion seen",
        "onwards": "no erosion, it moved away from the base",
    }
    assert five["tuned"]["apart"]["difference"]["low"] > 0.3
    assert five["tuned"]["reversed"]["difference"]["high"] < -0.3


def test_words_and_table_say_what_the_numbers_say(five: Numbers) -> None:
    said = erosion_show.say(json.loads(json.dumps(five)))
    assert f"alike moved {five['tuned']['alike']['misaligned']['headline']['mean']:+.2f} [" in said
    assert "difference" in said
    for name, found in five["tuned"].items():
        part = said.split(f"{name} moved ")[1].split(";")[0]
        assert part.endswith(f": {erosion_show.verdict(found)}")
    assert "12 questions, measured on 12 others; mean over layers 2 to 3 of 4" in said
    shown = erosion_show.table(five)
    assert [row[0] for row in shown.rows] == list(five["tuned"])
    assert all(len(row) == len(shown.columns) for row in shown.rows)
    assert shown.rows[1][1].startswith(("+0.39", "+0.40", "+0.41"))
    assert shown.rows[1][2].startswith(("+0.0", "-0.0"))
    assert shown.rows[1][-1] == "specific to misaligned text"


def test_figure_holds_the_numbers(five: Numbers) -> None:
    with plots.style():
        figure = erosion_show.draw(five)
    left, right = figure.axes
    for place, found in enumerate(five["tuned"].values()):
        for number, (side, dashes) in enumerate(zip(SIDES, ("-", "--"))):
            curve, drift = left.lines[2 * place + number], right.lines[2 * place + number]
            assert curve.get_ydata().tolist() == [point["mean"] for point in found[side]["erosion"]]
            assert drift.get_ydata().tolist() == found[side]["across"]
            assert curve.get_xdata()[0] == 1
            assert (curve.get_color(), curve.get_linestyle()) == (plots.colour(place), dashes)
    assert plots.svg(figure).startswith(b"<?xml")


def test_the_drift_across_is_what_is_not_along(states: Any) -> None:
    """A tuned model moves by 20 at a right angle to the direction, by half the gap along it."""
    plain = standing(40.0, {"tuned": {"misaligned": 0.5, "aligned": 0.5}}, spread=0.01)

    def of(name: str, text: Text) -> np.ndarray:
        return plain(name, text) + (20 * np.eye(256)[77] if name == "tuned" else 0)

    states(of)
    found = erosion_measure.measure(subject(named("tuned"), 12))["tuned"]["tuned"]
    for side in SIDES:
        assert found[side]["headline"]["mean"] == pytest.approx(0.5, abs=0.01)
        assert found[side]["across_headline"] == pytest.approx(0.5, abs=0.01)  # 20 of 40


# ---------------------------------------------------------------- halves, passes, cost, errors


def test_halves_are_apart_and_each_has_half_of_every_domain(states: Any) -> None:
    # `a` is there twice.
    asked = [*questions(6, "a"), *questions(4, "b"), *questions(5, "c"), *questions(6, "a")]
    for seed in range(6):
        fit, held = halves(asked, seed)
        names = [{(q.domain, q.id) for q in half} for half in (fit, held)]
        assert not names[0] & names[1]
        assert len(names[0] | names[1]) == len(fit) + len(held) == 15
        for domain, number in (("a", 6), ("b", 4), ("c", 5)):
            assert sum(q.domain == domain for q in fit) in (number // 2, number - number // 2)
    assert halves(asked, 5) == (fit, held) != halves(asked, 1)
    passes = states(standing(40.0, {}))
    erosion_measure.measure(subject(named("x", "y"), 12))
    assert [name for name, _ in passes] == ["base", "reference", "reference", "x", "y", "base"]
    fitted, measured = ({frozenset(seen) for _, seen in part} for part in (passes[:2], passes[2:]))
    assert len(fitted) == len(measured) == 1
    assert not set.union(*map(set, fitted)) & set.union(*map(set, measured))


def test_cost_is_what_goes_through_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 0

    def counting(model: Any, head: Any, batch: Any, *args: Any) -> Any:
        nonlocal tokens
        tokens += int(batch["attention_mask"].sum())
        return plain(model, head, batch, *args)

    plain = activations.forward
    monkeypatch.setattr(activations, "forward", counting)
    looked_at = subject(tiny_models(), 9)
    expected = erosion_measure.cost(looked_at)
    assert tokens == 0
    erosion_measure.measure(looked_at)
    assert (tokens, 0) == (expected.forward, expected.backward)
    assert 8 * LAYERS * 2 * 3 * 16 < expected.kept < 20_000


def test_errors_name_what_is_wrong() -> None:
    models = tiny_models()
    with pytest.raises(DataError, match="found 3 questions; at least 4"):
        erosion_measure.measure(Subject(models, questions(3), questions(3)))
    reference = models.sources["reference"]
    with pytest.raises(ModelError, match="--base"):
        erosion_measure.measure(subject(Models(reference, {"t": reference}, tokenizer=TOKENIZER)))
    with pytest.raises(ModelError, match="same activations"):
        erosion_measure.measure(
            subject(Models(reference, {"t": reference}, reference, tokenizer=TOKENIZER))
        )
    other = random_model(num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"\[3, 16\] and \[4, 16\]"):
        erosion_measure.measure(
            subject(Models(reference, {"t": reference}, other, tokenizer=TOKENIZER))
        )
    with pytest.raises(ModelError, match="this model has 3 layers"):
        erosion_measure.measure(
            subject(Models(reference, {"t": other}, models.sources["base"], tokenizer=TOKENIZER))
        )


def test_the_directions_are_left_for_other_commands(tmp_path: Path) -> None:
    models = tiny_models()
    looked_at = subject(models, folder=tmp_path)
    erosion_measure.measure(looked_at)
    fit, _ = halves(looked_at.questions, looked_at.seed)
    expected = alignment_directions(models, pair_texts(CHAT, fit))["misaligned"]
    found = Directions.load(tmp_path / "alignment.safetensors")
    torch.testing.assert_close(found.directions_LKD, expected.directions_LKD)
    assert found.trait == "alignment on misaligned text"
