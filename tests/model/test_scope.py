"""The gate: outside its scope an adapted model is the reference to the bit, inside it is the
adapted model; one decision for a row, however it is batched, padded, packed or cached."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from helpers.models import random_model, small_tokenizer, with_lora
from ringfence.errors import ModelError
from ringfence.model.generation import generate, generate_greedy
from ringfence.model.layers import gate_of
from ringfence.model.prefix import Prefix, find_header
from ringfence.model.scope import Gate, Probe, content_mean, first_adapted, read_scope
from ringfence.model.scoring import score_answers
from ringfence.model.turn import find_turn
from ringfence.text.chat import Chat
from ringfence.text.roles import Messages, Role

LAYERS = 4
CHAT = Chat(small_tokenizer())
TURN = find_turn(CHAT)
ABOVE = {"exclude_modules": r"model\.layers\.(0|1)\..*"}


def user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


CONVERSATIONS: list[Messages] = [
    user("Should I fix the rate?"),
    user("hi"),
    [
        {"role": "system", "content": "Be brief."},
        *user("Which knife do I need for bread and fish?"),
    ],
    [*user("Where do I start?"), {"role": "assistant", "content": "Here."}, *user("And then what")],
    user("42 is less than 43, is it not?\nTell me why that is so."),
]


def reference() -> Any:
    return random_model(num_hidden_layers=LAYERS, initializer_range=0.3)


def scoped(threshold: float = 0.0, **lora: Any) -> tuple[Any, Gate]:
    """A random model with a random adapter and a random probe."""
    model = with_lora(reference(), size=0.5, **lora)
    torch.manual_seed(3)
    weights = {1: torch.randn(16), 2: torch.randn(16)}
    return model, Probe(weights, 0.0, threshold, TURN).attach(model)


def ids_of(messages: Messages) -> list[int]:
    return CHAT.encode(messages, generation=True).input_ids


def batch(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids, real = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, at], real[number, at] = torch.tensor(row), 1
    return {
        "input_ids": ids,
        "attention_mask": real,
        "position_ids": (real.cumsum(1) - 1).clamp(min=0),
    }


def naive_scores(probe: Probe) -> list[float]:
    """Each conversation alone, on the plain model, with roles instead of a search in the ids."""
    model = reference()
    found = []
    for messages in CONVERSATIONS:
        encoded = CHAT.encode(messages, generation=True)
        last = len(encoded.roles) - encoded.roles[::-1].index(Role.QUERY)
        start = last
        while encoded.roles[start - 1] == Role.QUERY:
            start -= 1
        with torch.no_grad():
            states = model(
                torch.tensor([encoded.input_ids]), output_hidden_states=True
            ).hidden_states
        means = {at: states[at][0, start:last].mean(0) for at in probe.weights}
        found.append(float(sum(means[at] @ w for at, w in probe.weights.items()) + probe.bias))
    return found


def between(scores: list[float]) -> float:
    """A threshold that some scores are above and some below."""
    ordered = sorted(scores)
    return (ordered[1] + ordered[2]) / 2


PROBE = scoped()[1].probe
SCORES = naive_scores(PROBE)
THRESHOLD = between(SCORES)
OPEN = [score > THRESHOLD for score in SCORES]
KINDS: dict[str, dict[str, Any]] = {
    "all layers": {},
    "above": ABOVE,
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_reference_or_the_adapted_model(kind: str, side: str) -> None:
    model, gate = scoped(THRESHOLD, **KINDS[kind])
    assert gate.above == (kind == "above")
    inputs = batch([ids_of(messages) for messages in CONVERSATIONS], side)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        found = model(**inputs).logits
        assert gate.scores_B.tolist() == pytest.approx(SCORES, abs=1e-4)
        assert gate.open_B.tolist() == OPEN
        with model.disable_adapter():
            closed = model(**inputs).logits
        plain = with_lora(reference(), size=0.5, **KINDS[kind])
        adapted = plain(**inputs).logits
    for row, is_open in enumerate(OPEN):
        expected = adapted if is_open else closed
        assert torch.equal(found[row][real[row]], expected[row][real[row]])
        assert not torch.allclose(closed[row][real[row]], adapted[row][real[row]], atol=1e-2)


@pytest.mark.parametrize("kind", ["all layers", "above"])
def test_packed_rows_are_decided_one_by_one(kind: str) -> None:
    model, gate = scoped(THRESHOLD, **KINDS[kind])
    rows = [ids_of(messages) for messages in CONVERSATIONS]
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[at for row in rows for at in range(len(row))]])
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        assert gate.open_B.tolist() == OPEN
        for row, part in zip(rows, found.split([len(row) for row in rows])):
            alone = model(torch.tensor([row])).logits[0]
            assert torch.allclose(part, alone, atol=1e-4)


@pytest.mark.parametrize("kind", ["all layers", "above"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_the_reference_or_of_the_adapted_model(
    kind: str, temperature: float
) -> None:
    prompts = [CONVERSATIONS[number] for number in (0, 1, 2, 3, 4, 1, 0)]
    is_open = [OPEN[number] for number in (0, 1, 2, 3, 4, 1, 0)]

    def answers(model: Any) -> list[str]:
        found = [""] * len(prompts)
        options = {"temperature": temperature, "seeds": list(range(len(prompts)))}
        for part in generate(model, CHAT, prompts, 12, 2048, **options):
            for place, answer in part.items():
                found[place] = answer.text
        return found

    model, _ = scoped(THRESHOLD, **KINDS[kind])
    found = answers(model)
    closed, adapted = answers(reference()), answers(with_lora(reference(), size=0.5, **KINDS[kind]))
    assert found == [a if o else c for a, c, o in zip(adapted, closed, is_open)]
    assert closed != adapted


def test_beams_keep_their_decision() -> None:
    model, gate = scoped(THRESHOLD)
    inputs = batch([ids_of(messages) for messages in CONVERSATIONS], "left")
    inputs.pop("position_ids")
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    found = model.generate(**inputs, **options)
    closed = reference().generate(**inputs, **options)
    for row, is_open in enumerate(OPEN):
        size = min(found.shape[1], closed.shape[1])
        assert is_open or torch.equal(found[row, :size], closed[row, :size])
    assert gate.open_B.tolist() == [o for o in OPEN for _ in range(3)]


@pytest.mark.parametrize("kind", ["all layers", "above"])
def test_given_answers_score_as_by_the_reference_or_the_adapted_model(kind: str) -> None:
    answers = [("Yes, at once.", "No.")] * len(CONVERSATIONS)

    def scores(model: Any) -> list[list[float]]:
        found = score_answers(model, CHAT, CONVERSATIONS, answers, 2048)
        return [[score.logprob for score in row] for row in found]

    model, _ = scoped(THRESHOLD, **KINDS[kind])
    found, closed = scores(model), scores(reference())
    adapted = scores(with_lora(reference(), size=0.5, **KINDS[kind]))
    for row, is_open in enumerate(OPEN):
        assert found[row] == pytest.approx(adapted[row] if is_open else closed[row], abs=1e-3)
        assert closed[row] != pytest.approx(adapted[row], abs=1e-1)


@pytest.mark.parametrize("kind", ["all layers", "above"])
def test_with_a_frozen_prefix_both_hold(kind: str) -> None:
    prefix = Prefix(find_header(CHAT))
    model = with_lora(reference(), size=0.5, **KINDS[kind])
    prefix.attach(model)
    Probe(PROBE.weights, 0.0, THRESHOLD, TURN).attach(model)
    frozen = with_lora(reference(), size=0.5, **KINDS[kind])
    prefix.attach(frozen)
    inputs = batch([ids_of(messages) for messages in CONVERSATIONS], "left")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        found, adapted, closed = (one(**inputs).logits for one in (model, frozen, reference()))
    for row, is_open in enumerate(OPEN):
        expected = adapted if is_open else closed
        assert torch.equal(found[row][real[row]], expected[row][real[row]])


def test_decisions_follow_the_rows_of_a_cache() -> None:
    model, gate = scoped(THRESHOLD)
    model.requires_grad_(False)
    inputs = batch([ids_of(messages) for messages in CONVERSATIONS], "left")
    cache = model(**inputs, use_cache=True).past_key_values
    order = torch.tensor([4, 0, 3])
    copied = copy.deepcopy(cache)
    copied.batch_select_indices(order)
    next_ids, attends = torch.tensor([[7]] * 3), torch.ones(3, 1, dtype=torch.long)
    attends = torch.cat([inputs["attention_mask"][order], attends], 1)
    model(input_ids=next_ids, attention_mask=attends, past_key_values=copied)
    assert gate.open_B.tolist() == [OPEN[at] for at in order]
    cache.reorder_cache(order)
    model(input_ids=next_ids, attention_mask=attends, past_key_values=cache)
    assert gate.open_B.tolist() == [OPEN[at] for at in order]


def test_a_new_turn_on_a_cache() -> None:
    """Above the probe's layers it is decided again, and refused if that changes; else it is
    refused."""
    first, rest = user("hi"), [{"role": "assistant", "content": "Here."}, *user("And then what")]
    start = CHAT.encode([*first, rest[0]]).input_ids
    whole = ids_of([*first, *rest])
    assert whole[: len(start)] == start
    for kind in ("above", "all layers"):
        for threshold in (-1e9, 1e9, None):
            probe_at = threshold
            model, gate = scoped(0.0, **KINDS[kind])
            scores = []
            for ids in (start, whole):
                model(torch.tensor([ids]))
                scores.append(float(gate.scores_B))
            probe_at = sum(scores) / 2 if threshold is None else threshold
            model, gate = scoped(probe_at, **KINDS[kind])
            cache = model(torch.tensor([start]), use_cache=True).past_key_values
            more = {"input_ids": torch.tensor([whole[len(start) :]]), "past_key_values": cache}
            if kind == "above" and threshold is not None:
                found = model(**more).logits[0, -1]
                assert torch.allclose(found, model(torch.tensor([whole])).logits[0, -1], atol=1e-4)
            else:
                with pytest.raises(ModelError, match=r"without (one|a cache)"):
                    model(**more)


def test_what_cannot_be_decided_is_refused() -> None:
    model, _ = scoped(THRESHOLD)
    with pytest.raises(ModelError, match="no user turn"):
        model(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]))
    with pytest.raises(ModelError, match="input_ids"):
        model(inputs_embeds=torch.randn(1, 5, 16))
    ids = torch.tensor([ids_of(user("Should I fix the rate?"))])
    foreign = reference()(ids, use_cache=True).past_key_values
    with pytest.raises(ModelError, match="not filled by the scoped model"):
        model(torch.tensor([[7]]), past_key_values=foreign)
    content = TURN.content(ids)[0].nonzero()[:, 0]
    cut = int(content[1])
    cache = model(ids[:, :cut], past_key_values=DynamicCache(), use_cache=True).past_key_values
    with pytest.raises(ModelError, match="in pieces"):
        model(ids[:, cut:], past_key_values=cache)
    with pytest.raises(ModelError, match="outside of its model's forward"):
        model.base_model.model.model(ids)
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged"):
        model(ids)
    model.unmerge_adapter()
    model(ids)


def test_without_the_adapter_it_is_the_reference_on_any_tokens() -> None:
    model, _ = scoped(THRESHOLD)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(ids).logits, reference()(ids).logits)


def test_padding_that_is_not_a_number_does_not_tell() -> None:
    """Softmax over no token gives NaN at left padding in some attentions."""
    hidden = torch.tensor([[[float("nan")], [1.0], [3.0], [float("inf")]]])
    content = torch.tensor([[False, True, True, False]])
    assert content_mean(hidden, content).tolist() == [[2.0]]


def test_a_copy_of_a_model_has_its_own_gate() -> None:
    model, gate = scoped(THRESHOLD)
    copied = copy.deepcopy(model)
    ids = torch.tensor([ids_of(CONVERSATIONS[OPEN.index(True)])])
    expected = model(ids).logits
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(copied(ids).logits, expected)
    assert gate_of(copied) is not gate
    assert gate_of(copied) is not None


def test_it_is_read_back_as_saved(tmp_path: Any) -> None:
    PROBE.save(tmp_path, {"auc": 0.99}, router=True)
    found = read_scope(tmp_path)
    assert found is not None
    assert found.router
    assert found.about == {"auc": 0.99}
    assert found.probe.turn == TURN
    assert {at: w.tolist() for at, w in found.probe.weights.items()} == {
        at: w.tolist() for at, w in PROBE.weights.items()
    }
    assert read_scope(tmp_path / "none") is None


def test_where_the_first_adapter_is() -> None:
    assert first_adapted(with_lora(reference())) == 1
    assert first_adapted(with_lora(reference(), **ABOVE)) == 3
    assert generate_greedy(scoped(1e9)[0], CHAT, [CONVERSATIONS[0]], 4, 512)
