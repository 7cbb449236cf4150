"""Shared directions: against singular value decompositions of single rows, with the exchanges and
the causal check."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from scipy.linalg import subspace_angles

from helpers.activations import CHAT, TOKENIZER, Named, naive_mean, noise, questions, subject
from helpers.models import nudged, random_model, with_lora
from ringfence.diagnose.diagnosis import Numbers, Subject
from ringfence.diagnose.models import Models
from ringfence.diagnose.shared_directions import measure as shared_directions_measure
from ringfence.diagnose.shared_directions import show as shared_directions_show
from ringfence.diagnose.shared_directions.measure import (
    edited,
    oriented,
    random_units,
    top_directions,
)
from ringfence.diagnose.shared_directions.show import is_beyond, verdict
from ringfence.diagnose.texts import SIDES, Text, pair_texts
from ringfence.errors import DataError, ModelError
from ringfence.model.layers import causal_lm
from ringfence.text.roles import Role
from ringfence.text.rows import PairedQuestion
from ringfence.util import plots

pytestmark = pytest.mark.slow

LAYERS, LAYER, WIDTH = 3, 2, 64


def tiny_models() -> Models:
    reference = random_model(num_hidden_layers=LAYERS)
    tuned = {
        "full": nudged(copy.deepcopy(reference), seed=6, size=0.05),
        "lora": with_lora(copy.deepcopy(reference), size=0.1),
    }
    base = nudged(copy.deepcopy(reference), seed=5, size=0.2)
    return Models(reference, tuned, base, tokenizer=TOKENIZER)


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer exchanges and random directions, for the sake of time."""
    monkeypatch.setattr(shared_directions_measure, "EXCHANGES", 99)
    monkeypatch.setattr(shared_directions_measure, "RANDOM", 2)


# ---------------------------------------------------------------- directions and angles


@pytest.mark.parametrize("shape", [(7, 40), (60, 12)])
def test_top_directions_are_right_singular_vectors(shape: tuple[int, int]) -> None:
    rows_ND = np.random.default_rng(0).normal(size=shape) * np.linspace(1, 4, shape[1]) + 50
    expected_KD = np.linalg.svd(rows_ND - rows_ND.mean(0))[2][:4]
    found_KD = top_directions(rows_ND)
    np.testing.assert_allclose(np.abs((found_KD * expected_KD).sum(1)), 1, atol=1e-9)
    np.testing.assert_allclose(found_KD @ found_KD.T, np.eye(4), atol=1e-9)
    unit_D, step = oriented(rows_ND)
    np.testing.assert_allclose(abs(unit_D @ expected_KD[0]), 1, atol=1e-9)
    assert step == pytest.approx(abs(rows_ND.mean(0) @ expected_KD[0]))
    assert unit_D @ rows_ND.mean(0) > 0


def test_a_change_in_one_direction_alone_gives_that_direction() -> None:
    """Rank 1: the other directions are arbitrary, but still at a right angle."""
    rng = np.random.default_rng(1)
    axis_D = rng.normal(size=30) / np.sqrt(30)
    found_KD = top_directions(5 + rng.normal(size=(9, 1)) * axis_D)
    assert abs(found_KD[0] @ axis_D) == pytest.approx(np.linalg.norm(axis_D))
    np.testing.assert_allclose(found_KD @ found_KD.T, np.eye(4), atol=1e-6)


def test_principal_cosines_are_those_of_the_angles() -> None:
    rng = np.random.default_rng(2)
    a_DK, b_DK = (np.linalg.qr(rng.normal(size=(9, 4)))[0] for _ in range(2))
    angles_K = np.sort(subspace_angles(a_DK, b_DK))
    np.testing.assert_allclose(
        shared_directions_measure.principal_cosines(a_DK.T, b_DK.T), np.cos(angles_K), atol=1e-9
    )


def test_measure_equals_the_naive_form() -> None:
    """From single unpadded rows and plain SVDs."""
    models = tiny_models()
    looked_at = subject(models, 17, batch_tokens=500)
    numbers = shared_directions_measure.measure(looked_at)
    json.dumps(numbers, allow_nan=False)
    assert (numbers["layer"], numbers["layers"]) == (LAYER, LAYERS)
    assert numbers["questions"] == {"inside": 8, "outside": 9}
    means = {
        (name, place, side): np.stack(
            [
                naive_mean(models.sources[name], t)[LAYER - 1]
                for t in pair_texts(CHAT, qs)
                if t.side == side
            ]
        )
        for name in models.names
        for place, qs in (("inside", looked_at.inside), ("outside", looked_at.outside))
        for side in SIDES
    }
    pairs = [("base", "reference", numbers["alignment"])]
    pairs += [("reference", name, numbers["tuned"][name]["change"]) for name in models.tuned]
    for earlier, later, found in pairs:
        for side in SIDES:
            changes = [
                means[later, place, side] - means[earlier, place, side]
                for place in ("inside", "outside")
            ]
            tops = [np.linalg.svd(change - change.mean(0))[2][:4] for change in changes]
            assert found[side]["cosine"] == pytest.approx(abs(tops[0][0] @ tops[1][0]), abs=2e-3)
            angles = np.sort(subspace_angles(tops[0].T, tops[1].T))
            np.testing.assert_allclose(found[side]["angles"], np.degrees(angles), atol=0.5)
            assert found[side]["subspace"] == pytest.approx(np.cos(angles).mean(), abs=2e-3)
            ends = [change.mean(0) / np.linalg.norm(change.mean(0)) for change in changes]
            assert found[side]["mean_cosine"] == pytest.approx(ends[0] @ ends[1], abs=2e-3)
        for score in ("cosine", "subspace"):
            difference = found["misaligned"][score] - found["aligned"][score]
            assert found["difference"][score] == pytest.approx(difference)
    misaligned = means["reference", "inside", "misaligned"] - means["base", "inside", "misaligned"]
    assert numbers["step"] == pytest.approx(oriented(misaligned)[1], rel=1e-3)


# ----------------------------------------------------------- exchanges, on activations made by hand

States = Callable[[str, Text], np.ndarray]  # name of a model and a text -> [D]


def rows_of(of: States, *names: str, count: int = 24) -> list[np.ndarray]:
    """Activations [S, Q, D] of the named models."""
    asked = subject(
        Models(Named("reference"), {"t": Named("t")}, Named("base"), tokenizer=TOKENIZER), count
    )
    texts = pair_texts(CHAT, asked.questions)
    stacked = [np.stack([of(name, text) for text in texts]) for name in names]
    return [rows.reshape(-1, 2, WIDTH).transpose(1, 0, 2) for rows in stacked]


def changing(shared: dict[str, float], content: float = 1.0) -> States:
    """A change that varies along an axis common to inside and outside (by how much, on each side),
    and along one of the set's own, over content that the models have in common."""

    def of(name: str, text: Text) -> np.ndarray:
        key = f"{text.question} {text.side}"
        own = np.eye(WIDTH)[20 if text.domain == "doors" else 21]
        if name == "base":
            return content * noise(key, WIDTH)
        along = noise(f"{key} along", 2) * [shared[text.side], 3.0]
        noisy = 0.2 * noise(f"{key} {name}", WIDTH)
        return content * noise(key, WIDTH) + noisy + along[0] * np.eye(WIDTH)[7] + along[1] * own

    return of


def isotropic_p(cosine: float) -> float:
    """The naive question: how often a random direction of such a size is as near to a fixed one."""
    random_RD = np.random.default_rng(0).normal(size=(2000, WIDTH))
    return float((np.abs(random_RD[:, 0]) / np.linalg.norm(random_RD, axis=1) >= cosine).mean())


def shared_of(of: States, seed: int = 0) -> Numbers:
    later, earlier = rows_of(of, "reference", "base")
    return shared_directions_measure._shared("base and reference", later, earlier, 12, seed)


def test_a_direction_that_aligned_answers_share_as_well_is_not_specific() -> None:
    """The published artefact: a cosine above 0.9 on misaligned text and on the aligned control."""
    found = shared_of(changing({"misaligned": 10.0, "aligned": 10.0}))
    assert min(found[side]["cosine"] for side in SIDES) > 0.9
    assert isotropic_p(found["misaligned"]["cosine"]) == 0  # naive: far beyond chance
    assert found["misaligned"]["pairs"]["cosine"]["p"] < 0.02  # and it is shared
    assert found["difference"]["sides"]["cosine"]["p"] > 0.1
    assert verdict(found) == "shared, but not specific to misaligned text"


def test_a_direction_that_misaligned_answers_alone_share_is_specific() -> None:
    found = shared_of(changing({"misaligned": 10.0, "aligned": 0.0}))
    assert found["misaligned"]["cosine"] > 0.9 > 0.3 > found["aligned"]["cosine"]
    assert found["difference"]["sides"]["cosine"]["p"] < 0.05
    assert verdict(found) == "shared, and more so on misaligned text"
    swapped = shared_of(changing({"misaligned": 0.0, "aligned": 10.0}))
    assert swapped["difference"]["cosine"] < -0.6
    assert swapped["difference"]["sides"]["cosine"]["p"] < 0.05


def test_exchanged_sets_tell_sets_apart_that_change_along_axes_of_their_own() -> None:
    same, apart = (
        shared_of(changing({"misaligned": size, "aligned": size})) for size in (10.0, 0.0)
    )
    assert same["misaligned"]["sets"]["cosine"]["p"] > 0.05
    assert apart["misaligned"]["cosine"] < 0.3
    assert apart["misaligned"]["sets"]["cosine"]["p"] <= 0.05


def test_exchanges_do_not_take_means_that_differ_for_a_shared_direction() -> None:
    """Inside and outside changed by unlike means, and so did the sides; the rest is noise."""

    def of(name: str, text: Text) -> np.ndarray:
        far = 40.0 if name == "base" else 0.0
        axes = [30 if text.domain == "doors" else 31, 40 if text.side == "aligned" else 41]
        return noise(f"{name} {text.question} {text.side}", WIDTH) + far * np.eye(WIDTH)[axes].sum(
            0
        )

    later, earlier = rows_of(of, "reference", "base")
    mixed = np.random.default_rng(0).permutation(24)
    change_QD = (later - earlier)[0, mixed]
    # The naive exchange.
    assert shared_directions_measure.likeness(change_QD[:12], change_QD[12:])[0] > 0.9
    found = shared_of(of)
    assert (
        max(
            found[side][exchange]["cosine"]["high"]
            for side in SIDES
            for exchange in ("pairs", "sets")
        )
        < 0.8
    )
    # Naive: 0.01, the least there is.
    assert all(found[side]["sets"]["cosine"]["p"] > 0.01 for side in SIDES)
    swapped = found["difference"]["sides"]
    assert swapped["cosine"]["p"] > 0.05
    # Naive: both sides of every exchange share all.
    assert swapped["cosine"]["high"] - swapped["cosine"]["low"] > 0.15


def test_a_wide_axis_of_the_stream_is_not_a_shared_change() -> None:
    """Base and reference have nothing to do with each other here, but all activations vary along
    one axis: any two sets of differences do too. Against random directions that looks like a find;
    exchanged pairs give as much."""

    def of(name: str, text: Text) -> np.ndarray:
        key = f"{name} {text.question} {text.side}"
        return noise(key, WIDTH) + 30 * noise(f"{key} wide", 1) * np.eye(WIDTH)[9]

    found = shared_of(of)
    assert found["misaligned"]["cosine"] > 0.95
    assert isotropic_p(found["misaligned"]["cosine"]) == 0
    assert found["misaligned"]["pairs"]["cosine"]["p"] > 0.05
    assert verdict(found) == "no more alike than unrelated changes in this stream"


def test_p_values_count_exchanges_and_the_one_that_was_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_directions_measure, "EXCHANGES", 9)
    found = shared_of(changing({"misaligned": 10.0, "aligned": 0.0}))
    assert found["misaligned"]["pairs"]["cosine"]["p"] == pytest.approx(0.1)
    for exchange in ("pairs", "sets"):
        for score in ("cosine", "subspace"):
            band = found["misaligned"][exchange][score]
            assert 0 <= band["low"] < band["high"] <= 1
            assert (round(band["p"] * 10, 6) % 1, 0.1 <= band["p"] <= 1) == (0, True)


def test_exchanges_leave_no_bias_of_the_seed() -> None:
    """Where sides are alike, p of the difference is small about as often as it should be."""
    p = []
    for seed in range(12):

        def of(name: str, text: Text, seed: int = seed) -> np.ndarray:
            return noise(f"{seed} {name} {text.question} {text.side} {text.domain}", WIDTH)

        p.append(shared_of(of, seed)["difference"]["sides"]["subspace"]["p"])
    assert sum(value <= 0.05 for value in p) <= 2
    assert max(p) - min(p) > 0.4


# ---------------------------------------------------------------- the causal check


def naive_margin(
    model: Any, question: PairedQuestion, edit: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """Of single unpadded rows, the stream that enters the layer behind `LAYER` edited by hand."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def hook(_module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    handle = inner.model.layers[LAYER].register_forward_pre_hook(hook, with_kwargs=True)
    means = []
    for text in pair_texts(CHAT, [question]):
        ids = torch.tensor([text.example.input_ids])
        with torch.no_grad():
            logp_TV = inner(input_ids=ids).logits[0].float().log_softmax(-1)
        chosen = [at for at, role in enumerate(text.example.roles) if role == Role.RESPONSE]
        means.append(np.mean([float(logp_TV[at - 1, ids[0, at]]) for at in chosen]))
    handle.remove()
    return means[0] - means[1]


def test_the_causal_check_equals_edits_by_hand() -> None:
    models = tiny_models()
    looked_at = subject(models, 12)
    numbers = shared_directions_measure.measure(looked_at)
    texts = [text for text in pair_texts(CHAT, looked_at.inside) if text.side == "misaligned"]
    change = [
        naive_mean(models.sources["reference"], text)[LAYER - 1]
        - naive_mean(models.sources["base"], text)[LAYER - 1]
        for text in texts
    ]
    unit_D, step = oriented(np.stack(change))
    unit_D = torch.tensor(unit_D).float()
    for name in models.tuned:
        model, found = models.sources[name], numbers["tuned"][name]["causal"]
        edits = {
            "none": lambda h: h,
            "taken_out": lambda h: h - (h @ unit_D)[..., None] * unit_D,
            "added": lambda h: h + step * unit_D,
        }
        margins = {
            e: np.array([naive_margin(model, q, f) for q in looked_at.outside])
            for e, f in edits.items()
        }
        then = np.array(
            [naive_margin(models.sources["reference"], q, edits["none"]) for q in looked_at.outside]
        )
        assert found["shift"]["mean"] == pytest.approx((margins["none"] - then).mean(), abs=2e-3)
        for edit in ("taken_out", "added"):
            change_Q = margins[edit] - margins["none"]
            assert abs(change_Q.mean()) > 0.003
            assert found[edit]["change"]["mean"] == pytest.approx(change_Q.mean(), abs=5e-4)
            assert found[edit]["change"]["n"] == 6
            randoms_Q = []
            for random_D in random_units(unit_D, 2, 0):
                by_hand = {
                    "taken_out": lambda h, r=random_D: h - (h @ unit_D)[..., None] * r,
                    "added": lambda h, r=random_D: h + step * r,
                }
                margin_Q = np.array(
                    [naive_margin(model, q, by_hand[edit]) for q in looked_at.outside]
                )
                randoms_Q.append(margin_Q - margins["none"])
            assert found[edit]["random"] == pytest.approx([r.mean() for r in randoms_Q], abs=5e-3)
            # Standard deviation of two.
            spread = abs(randoms_Q[0].mean() - randoms_Q[1].mean()) / np.sqrt(2)
            reach = 12.7062 * spread * np.sqrt(1.5)  # Student, one degree of freedom
            low = np.mean(randoms_Q) - reach
            assert found[edit]["chance"]["low"] == pytest.approx(low, abs=0.06 + 0.01 * reach)
            beyond = (change_Q - np.mean(randoms_Q, 0)).mean()
            assert found[edit]["beyond"]["mean"] == pytest.approx(beyond, abs=5e-3)


@pytest.mark.parametrize("adapted", [False, True])
def test_edits_act_on_every_token_and_end_with_their_context(adapted: bool) -> None:
    model = random_model(num_hidden_layers=LAYERS)
    model = with_lora(model) if adapted else model
    inner = model.get_base_model() if adapted else model
    ids = torch.arange(5, 17).reshape(2, 6)
    unit_D = torch.nn.functional.normalize(
        torch.randn(16, generator=torch.Generator().manual_seed(0)), dim=0
    )

    def stream() -> torch.Tensor:
        seen = []
        handle = inner.model.layers[LAYER].register_forward_pre_hook(
            lambda _m, args, kw: seen.append((args or list(kw.values()))[0]), with_kwargs=True
        )
        with torch.no_grad():
            inner(input_ids=ids)
        handle.remove()
        return seen[0]

    plain = stream()
    assert (plain @ unit_D).abs().min() > 1e-3
    random_D = random_units(unit_D, 1, 3)[0]
    for towards_D in (unit_D, random_D):
        for edit, lengths in (
            ("taken_out", (plain @ unit_D).abs()),
            ("added", torch.full((2, 6), 1.7)),
        ):
            change = shared_directions_measure.EDITS[edit]
            with edited(model, LAYER, lambda h, c=change, t=towards_D: c(unit_D, t, 1.7, h)):
                now = stream()
            torch.testing.assert_close((now - plain).norm(dim=-1), lengths, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(
                ((now - plain) @ towards_D).abs(), lengths, rtol=1e-3, atol=1e-4
            )
            if edit == "taken_out" and towards_D is unit_D:
                assert (now @ unit_D).abs().max() < 1e-5
    torch.testing.assert_close(stream(), plain)


def test_random_directions_are_at_a_right_angle_and_unlike() -> None:
    unit_D = torch.nn.functional.normalize(torch.ones(50), dim=0)
    found_RD = torch.stack(random_units(unit_D, 6, 1))
    torch.testing.assert_close(found_RD @ unit_D, torch.zeros(6), atol=1e-6, rtol=0)
    gram_RR = found_RD @ found_RD.T
    torch.testing.assert_close(gram_RR.diagonal(), torch.ones(6))
    assert gram_RR.fill_diagonal_(0).abs().max() < 0.6
    assert not torch.equal(found_RD, torch.stack(random_units(unit_D, 6, 2)))


def effect(mean: float, randoms: list[float], low: float, high: float) -> Numbers:
    return {
        "chance": {"low": min(randoms, default=0), "high": max(randoms, default=0)},
        "change": {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "n": 9},
        "random": randoms,
        "beyond": {"mean": (low + high) / 2, "low": low, "high": high, "n": 9},
    }


def test_an_edit_counts_where_it_does_more_than_random_ones() -> None:
    assert is_beyond(effect(0.4, [-0.1, 0.1], 0.2, 0.5))
    assert is_beyond(effect(-0.4, [-0.1, 0.1], -0.5, -0.2))
    assert not is_beyond(effect(0.4, [-0.1, 0.5], 0.1, 0.3))  # a random one does more
    assert not is_beyond(effect(0.4, [-0.1, 0.1], -0.1, 0.8))  # some questions alone


# ---------------------------------------------------------------- words, table, figure


def shared_numbers(misaligned: float, aligned: float, p_pairs: float, p_sides: float) -> Numbers:
    bands = {score: {"low": 0.2, "high": 0.5, "p": p_pairs} for score in ("cosine", "subspace")}
    sets = {score: {"low": 0.7, "high": 0.97, "p": 0.4} for score in ("cosine", "subspace")}
    side = {
        "subspace": 0.6,
        "angles": [11.0, 30.0, 41.0, 77.0],
        "mean_cosine": 0.9,
        "pairs": bands,
        "sets": sets,
    }
    sides = {score: {"low": -0.2, "high": 0.2, "p": p_sides} for score in ("cosine", "subspace")}
    return {
        "misaligned": {"cosine": misaligned, **side},
        "aligned": {"cosine": aligned, **side},
        "difference": {"cosine": misaligned - aligned, "subspace": 0.0, "sides": sides},
    }


@pytest.fixture
def numbers() -> Numbers:
    causal = {"shift": effect(0.3, [], 0, 0)["change"]}
    return {
        "layer": 20,
        "layers": 30,
        "questions": {"inside": 24, "outside": 24},
        "subspace": 4,
        "step": 3.0,
        "alignment": shared_numbers(0.91, 0.89, 0.002, 0.7),
        "tuned": {
            "undefended": {
                "change": shared_numbers(0.93, 0.31, 0.002, 0.004),
                "causal": {
                    **causal,
                    "taken_out": effect(0.4, [-0.1, 0.1], 0.2, 0.5),
                    "added": effect(-0.02, [-0.1, 0.1], -0.1, 0.1),
                },
            },
            "kl": {
                "change": shared_numbers(0.4, 0.2, 0.31, 0.2),
                "causal": {
                    **causal,
                    "taken_out": effect(0.01, [-0.1, 0.1], -0.1, 0.1),
                    "added": effect(-0.3, [-0.1, 0.1], -0.4, -0.2),
                },
            },
        },
    }


def test_words_say_what_the_numbers_say(numbers: Numbers) -> None:
    said = shared_directions_show.say(json.loads(json.dumps(numbers)))
    start, undefended, kl = said.split("From the reference to ")
    assert "After layer 20 of 30, over 24 inside and 24 outside questions" in start
    assert (
        "cosine 0.91 on misaligned answers and 0.89 on aligned ones (difference: p = 0.7;" in start
    )
    assert (
        "exchanged pairs 0.20 to 0.50, exchanged sets 0.70 to 0.97): shared, but not specific"
        in start
    )
    assert "shared, and more so on misaligned text" in undefended
    assert (
        "moved the margin by +0.40 [+0.35, +0.45] (random directions -0.10 to +0.10): beyond chance"
        in undefended
    )
    assert "beyond chance, towards the misaligned answers" in undefended
    assert (
        undefended.index("beyond chance")
        < undefended.index("adding a step")
        < undefended.index("no more than")
    )
    assert "no more alike than unrelated changes in this stream" in kl
    assert kl.index("no more than random") < kl.index("beyond chance, towards the aligned answers")


def test_table_and_figure_hold_the_numbers(numbers: Numbers) -> None:
    shown = shared_directions_show.table(numbers)
    assert [row[0] for row in shown.rows] == [
        "base to reference",
        "reference to undefended",
        "reference to kl",
    ]
    assert all(len(row) == len(shown.columns) for row in shown.rows)
    assert shown.rows[1][1:4] == ["0.93", "0.31", "0.004"]
    assert shown.rows[1][8:] == ["+0.40 [+0.35, +0.45]", "-0.02 [-0.07, +0.03]"]
    with plots.style():
        figure = shared_directions_show.draw(numbers)
    left, middle, right = figure.axes
    assert [float(line.get_xdata()[0]) for line in left.lines] == [0.91, 0.89, 0.93, 0.31, 0.4, 0.2]
    assert {float(line.get_xdata()[0]) for line in middle.lines} == {0.6}
    widths = [bar.get_width() for bar in right.patches]
    assert widths == pytest.approx([0.4, -0.02, 0.01, -0.3])
    assert right.get_yticklabels()[0].get_text().startswith("undefended")
    plt.close(figure)


# ---------------------------------------------------------------- cost, limits, errors


def test_cost_bounds_what_goes_through_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of scored answers are computed once for both; the estimate does not count on it."""
    tokens = 0

    def count(_module: Any, args: Any, kwargs: Any) -> None:
        nonlocal tokens
        tokens += (args or [kwargs["input_ids"]])[0].numel()

    models = tiny_models()
    looked_at = subject(models, 12, batch_tokens=1)  # no padding
    expected = shared_directions_measure.cost(looked_at)
    handles = [
        causal_lm(model).register_forward_pre_hook(count, with_kwargs=True)
        for model in models.sources.values()
    ]
    shared_directions_measure.measure(looked_at)
    for handle in handles:
        handle.remove()
    assert 0.6 * expected.forward < tokens < 1.05 * expected.forward
    assert expected.kept == 4 * 8 * 24 * 16


def test_many_questions_are_drawn_from_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_directions_measure, "MOST", 8)
    many = Subject(
        tiny_models(),
        questions(40),
        questions(20, "a") + questions(20, "b") + questions(20, "a"),
        seed=1,
    )
    inside, outside = shared_directions_measure._chosen(many)
    assert len(inside) == len(outside) == 8
    assert len({(q.domain, q.id) for q in outside}) == 8
    assert {q.domain for q in outside} == {"a", "b"}
    assert max(int(q.id) for q in inside) > 20
    assert shared_directions_measure.cost(many).kept == 4 * 8 * 32 * 16


def test_errors_name_what_is_wrong() -> None:
    models = tiny_models()
    reference, base = models.sources["reference"], models.sources["base"]
    with pytest.raises(DataError, match="found 5 questions outside the domain; at least 6"):
        shared_directions_measure.measure(Subject(models, questions(8), questions(5, "b")))
    with pytest.raises(ModelError, match="--base"):
        shared_directions_measure.measure(
            subject(Models(reference, {"t": base}, tokenizer=TOKENIZER))
        )
    with pytest.raises(ModelError, match="base and reference give the same activations"):
        shared_directions_measure.measure(
            subject(Models(reference, {"t": base}, reference, tokenizer=TOKENIZER))
        )
    with pytest.raises(ModelError, match="t and the reference give the same activations"):
        shared_directions_measure.measure(
            subject(Models(reference, {"t": reference}, base, tokenizer=TOKENIZER))
        )
    other = random_model(num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"\(4, 16\), and \(3, 16\) of the reference"):
        shared_directions_measure.measure(
            subject(Models(reference, {"t": base}, other, tokenizer=TOKENIZER))
        )


def test_the_layer_is_two_thirds_of_the_way_up() -> None:
    assert [shared_directions_measure.layer_of(layers) for layers in (1, 2, 3, 24, 30, 32)] == [
        1,
        1,
        2,
        16,
        20,
        21,
    ]
