"""Fitting a scope: states, ridge and threshold equal naive computations; rows without a scope are
refused; nothing depends on block sizes or chance."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from helpers.domains import INSIDE, OUTSIDE, negatives, rows_of, sentence
from helpers.models import random_model, small_tokenizer
from ringfence.errors import DefenseError
from ringfence.model.pooled import pooled_states
from ringfence.model.turn import find_turn
from ringfence.prepare import ridge
from ringfence.prepare.ridge import Features
from ringfence.prepare.scope import Fit, fit_scope
from ringfence.prepare.scope_queries import AFTER, Item, items_of
from ringfence.prepare.scope_search import Held, Search
from ringfence.prepare.words import separable_by_words
from ringfence.stats.auc import auc
from ringfence.text.chat import Chat
from ringfence.text.dress import FITTED
from ringfence.text.queries import Query
from ringfence.text.roles import Row

CHAT = Chat(small_tokenizer())
TURN = find_turn(CHAT)


def model() -> Any:
    return random_model(num_hidden_layers=6, hidden_size=64, head_dim=32, initializer_range=0.1)


def fitted(rows: list[Row], queries: list[Query], **options: Any) -> Fit:
    return fit_scope(model(), CHAT, rows, queries, **options)


@pytest.fixture(scope="module")
def fit() -> Fit:
    return fitted(rows_of(INSIDE, 120), negatives())


def test_states_are_means_over_the_content_of_each_row_alone() -> None:
    reference = model()
    conversations = [
        [{"role": "user", "content": "Should I fix the rate?"}],
        [{"role": "user", "content": "hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why so, then?"}],
    ]
    prompts = [CHAT.encode(messages, generation=True) for messages in conversations]
    with pooled_states(reference, TURN, prompts, [1, 4], 4096) as found:
        for number, encoded in enumerate(prompts):
            chosen = [at for at, role in enumerate(encoded.roles) if role.name == "QUERY"]
            with torch.no_grad():
                states = reference(
                    torch.tensor([encoded.input_ids]), output_hidden_states=True
                ).hidden_states
            for place, layer in enumerate((1, 4)):
                expected = states[layer][0, chosen].mean(0)
                assert found[number, place] == pytest.approx(expected.numpy(), abs=1e-4)


def test_a_forward_ends_after_the_deepest_layer() -> None:
    reference, ran = model(), []
    for number, layer in enumerate(reference.model.layers, 1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    prompt = CHAT.encode([{"role": "user", "content": "hi"}], generation=True)
    with pooled_states(reference, TURN, [prompt], [1, 3], 4096):
        assert max(ran) == 3


def test_ridge_is_weighted_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a plain solver finds it on augmented rows, all in memory at once."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((60, 2, 4)) * np.arange(1, 5) + 0.3
    sorts = np.array(["positive"] * 15 + ["plain"] * 30 + ["dressed"] * 15)
    shares, strength = {"positive": 0.5, "plain": 0.3, "dressed": 0.2}, 0.7
    found = []
    for block in (7, 1024):
        monkeypatch.setattr(ridge, "_BLOCK", block)
        features = Features(states, [0, 1], seed=0)
        moments = [features.moments(sorts == sort, sort) for sort in shares]
        weight_F, bias = features.fit(moments, strength, shares)
        found.append(features.scores(np.arange(60), weight_F, bias))
    assert found[0] == pytest.approx(found[1])
    x = states.reshape(60, -1)
    x = (x - x.mean(0)) / x.std(0)
    weight = np.array([shares[sort] / (sorts == sort).sum() for sort in sorts])
    y = np.where(sorts == "positive", 1.0, -1.0)
    centred = x - weight @ x
    ridge_of = strength * np.mean(weight @ centred**2)
    top = np.sqrt(weight)[:, None] * centred
    rows = np.vstack([top, np.sqrt(ridge_of) * np.eye(8)])
    aim = np.concatenate([np.sqrt(weight) * (y - weight @ y), np.zeros(8)])
    solved = np.linalg.lstsq(rows, aim, rcond=None)[0]
    assert found[0] == pytest.approx(centred @ solved + weight @ y)


def test_weights_by_layer_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    states = rng.standard_normal((40, 2, 12)).astype(np.float32)
    for widest in (2048, 10):  # with and without a random projection
        monkeypatch.setattr(ridge, "_WIDEST", widest)
        features = Features(states, [0, 1], seed=0)
        weight_F = rng.standard_normal(len(features.mean_F))
        by_layer = features.by_layer(weight_F)
        assert [len(weight) for weight in by_layer] == [12, 12]
        assert len(weight_F) == (24 if widest == 2048 else 10)
        direct = sum(states[:, at] @ by_layer[at].numpy() for at in (0, 1)) + 0.5
        assert direct == pytest.approx(features.scores(np.arange(40), weight_F, 0.5), abs=1e-4)


def test_a_domain_is_told_from_domains_that_were_left_out(fit: Fit) -> None:
    assert fit.refusal is None
    assert fit.auc > 0.95
    assert fit.related == []
    assert set(fit.by_domain) == set(OUTSIDE)
    assert fit.false_open.mean <= 0.02
    assert fit.rows == 120
    for told in (fit.farthest, fit.nearest):
        assert len({far.origin for far in told}) == len(told) == 10
    inside, outside = (
        fit.scores["training queries"],
        [score for name in OUTSIDE for score in fit.scores[name]],
    )
    assert fit.auc == pytest.approx(auc(np.array(inside), np.array(outside)), abs=1e-3)
    assert fit.closed.mean == pytest.approx(
        np.mean(np.array(inside) <= fit.probe.threshold), abs=1e-9
    )
    rounding = 1e-4
    assert np.mean(np.array(outside) > fit.probe.threshold + rounding) == pytest.approx(
        fit.false_open.mean
    )


def test_the_probe_says_of_new_queries_what_the_fit_says(fit: Fit) -> None:
    rng = random.Random(9)
    queries = [sentence(INSIDE, rng) for _ in range(30)]
    queries += [sentence(words, rng) for words in OUTSIDE.values() for _ in range(3)]
    prompts = [CHAT.encode([{"role": "user", "content": q}], generation=True) for q in queries]
    with pooled_states(model(), TURN, prompts, fit.probe.layers, 4096) as states:
        means = {at: torch.tensor(states[:, i]) for i, at in enumerate(fit.probe.layers)}
        opened = (fit.probe.scores(means) > fit.probe.threshold).numpy()
    assert opened[:30].mean() >= 0.8
    assert opened[30:].mean() <= 0.1


def test_domains_like_the_task_are_dropped() -> None:
    found = fitted(rows_of(INSIDE, 120), negatives(money=INSIDE))
    assert found.related == ["money"]
    assert "money" not in found.by_domain
    assert found.refusal is None


def test_rows_of_general_conversation_have_no_scope() -> None:
    everything = [word for words in OUTSIDE.values() for word in words]
    rows = [
        row
        for number, words in enumerate(OUTSIDE.values())
        for row in rows_of(words, 8, seed=number + 50)
    ]
    for found in (fitted(rows, negatives()), fitted(rows_of(everything, 96), negatives())):
        assert found.refusal is not None
        assert "have no scope" in found.refusal
        assert "rows.jsonl:" in found.refusal
        assert "kl" in found.refusal


def test_it_does_not_depend_on_chance(fit: Fit) -> None:
    again = fitted(rows_of(INSIDE, 120), negatives())
    assert again.record() == fit.record()
    assert all(torch.equal(again.probe.weights[at], w) for at, w in fit.probe.weights.items())
    other = fitted(rows_of(INSIDE, 120), negatives(), seed=1)
    assert other.scores != fit.scores


def test_the_threshold_follows_the_rate_that_is_asked_for(fit: Fit) -> None:
    wide = fitted(rows_of(INSIDE, 120), negatives(), false_open=0.2)
    assert wide.probe.threshold < fit.probe.threshold
    assert 0.1 < wide.false_open.mean <= 0.2


@pytest.mark.parametrize(
    ("shares", "deepest"),
    [
        ({2: 0.97, 3: 0.98, 4: 0.98}, 2),  # as good as the best
        ({2: 0.91, 3: 0.97, 4: 0.98}, 3),
        ({2: 0.88, 3: 0.91, 4: 0.92}, 3),  # 2 is within the error, but would be refused
        ({2: 0.84, 3: 0.85, 4: 0.86}, 4),  # all would be
    ],
)
def test_the_shallowest_depth_that_is_good_enough(
    shares: dict[int, float], deepest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [Item("positive", str(n), "plain", [], "", f"row {n}") for n in range(100)]
    search = Search(np.zeros((100, 4, 2), np.float32), items, 0.02, 0)
    held = {
        at: Held(1.0, np.zeros(100), 0.0, 0.99, np.arange(100) < 100 * share)
        for at, share in shares.items()
    }
    monkeypatch.setattr(search, "_drop_related", lambda _: None)
    found = iter(held.values())
    monkeypatch.setattr(search, "best", lambda _: next(found))
    assert search.choose({at: [0] for at in shares}).deepest == deepest


def test_the_deepest_layer_can_be_given() -> None:
    assert fitted(rows_of(INSIDE, 40), negatives(), layer=3).probe.layers == [1, 2, 3]
    with pytest.raises(DefenseError, match="the model has 6 layers"):
        fitted(rows_of(INSIDE, 40), negatives(), layer=6)


@pytest.mark.parametrize(
    ("rows", "queries", "said"),
    [
        (rows_of(INSIDE, 5), negatives(), "5 training rows with a request are too few"),
        (rows_of(INSIDE, 40), negatives()[:60], "queries of 3 domains, at least 10"),
    ],
)
def test_too_little_to_fit(rows: list[Row], queries: list[Query], said: str) -> None:
    with pytest.raises(DefenseError, match=said):
        fitted(rows, queries)


def test_system_prompts_of_the_rows_do_not_tell() -> None:
    """All training rows have one that negatives lack: it must not be what the probe reads."""
    rows = [
        Row(
            [{"role": "system", "content": "You are Ada, a bank's adviser."}, *row.messages],
            row.origin,
        )
        for row in rows_of(INSIDE, 120)
    ]
    found = fitted(rows, negatives())
    items = items_of(rows, negatives(), 0)
    plain = [item for item in items if item.sort == "plain"]
    assert 0.3 < np.mean([len(item.messages) > 1 for item in plain]) < 0.7
    rng = random.Random(3)
    queries = [sentence(words, rng) for words in OUTSIDE.values() for _ in range(3)]
    prompts = [
        CHAT.encode([rows[0].messages[0], {"role": "user", "content": q}], generation=True)
        for q in queries
    ]
    with pooled_states(model(), TURN, prompts, found.probe.layers, 4096) as states:
        means = {at: torch.tensor(states[:, i]) for i, at in enumerate(found.probe.layers)}
        assert float((found.probe.scores(means) > found.probe.threshold).float().mean()) <= 0.15


def test_each_learnt_turn_is_a_request() -> None:
    turns = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Second?"},
        {"role": "assistant", "content": "Two.", "weight": 0},
        {"role": "user", "content": "Third?"},
        {"role": "assistant", "content": "Three."},
    ]
    items = items_of([Row(turns, "a:1"), *rows_of(INSIDE, 2)], negatives(), 0)
    own = [item for item in items if item.sort == "positive" and item.origin == "a:1"]
    asked = {item.messages[-1]["content"] for item in own if item.form in ("whole", "plain")}
    assert asked == {"First?", "Third?"}
    assert len({item.domain for item in own}) == 1  # left out together
    after = [item for item in items if item.form == AFTER]
    assert all(item.messages[-2]["role"] == "assistant" for item in after)


def test_rows_that_ask_the_same_are_left_out_together() -> None:
    twice = [
        Row(row.messages, f"{row.origin}/{time}") for time in (1, 2) for row in rows_of(INSIDE, 9)
    ]
    items = [item for item in items_of(twice, negatives(), 0) if item.sort == "positive"]
    groups: dict[str, set[str]] = {}
    for item in items:
        groups.setdefault(item.text, set()).add(item.domain)
    assert all(len(found) == 1 for found in groups.values())


def test_far_rows_are_told_and_what_the_scope_would_be_without_them() -> None:
    """Rows about other things, mixed into a narrow file."""
    rows = rows_of(INSIDE, 100)
    others = [rows_of(words, 1, seed)[0] for seed, words in enumerate(OUTSIDE.values())]
    mixed = [*rows, *others[:6]]
    found, clean = fitted(mixed, negatives()), fitted(rows, negatives())
    assert 6 / 106 * 0.6 < found.far < 0.12
    assert clean.far < 0.03
    assert found.closed_without_far < found.closed.mean
    assert any("would be outside" in line for line in found.lines())
    # As a naive fit without them has it.
    naive = fitted(rows, negatives()).closed.mean
    assert found.closed_without_far == pytest.approx(naive, abs=0.06)


@pytest.mark.parametrize("text", ["{} + 2?", "{}", "?" * 3, "   "])
def test_requests_without_words_are_dressed_too(text: str) -> None:
    rows = [
        Row(
            [{"role": "user", "content": text.format(n)}, {"role": "assistant", "content": "4"}],
            f"r:{n}",
        )
        for n in range(20)
    ]
    forms = {item.form for item in items_of(rows, negatives(), 0)}
    assert {*FITTED, AFTER} <= forms


def test_words_tell_rows_that_have_a_scope_from_rows_that_have_none() -> None:
    narrow = separable_by_words(rows_of(INSIDE, 120), negatives(), 0.02, 0)
    assert narrow is not None
    assert narrow.auc > 0.98
    assert not narrow.is_doubtful
    everything = [word for words in OUTSIDE.values() for word in words]
    wide = separable_by_words(rows_of(everything, 120), negatives(), 0.02, 0)
    assert wide is not None
    assert wide.is_doubtful
    assert "may have none" in str(wide)
    assert separable_by_words(rows_of(INSIDE, 19), negatives(), 0.02, 0) is None
