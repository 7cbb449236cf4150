"""Keys and values are those of the model's own cache, and carry gradient; hidden states are those
of the head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.models import is_adapted, nudged, tiny, with_lora
from helpers.naive import own_cache, residual_stream, row_logits
from helpers.penalties import assert_same, gradients
from helpers.rows import PREFIX_A, Items, batch_of, mixed_items
from ringfence.errors import DefenseError
from ringfence.model.layers import causal_lm
from ringfence.model.losses import find_head
from ringfence.model.taps import Needs, Taps, forward, prefix_kv
from ringfence.text.roles import Role
from ringfence.training.reference import ADAPTER, Reference

pytestmark = pytest.mark.slow


def taps_of(model: Any, items: Items, side: str = "right", kv: bool = True) -> Taps:
    batch = batch_of(items, side)
    return forward(
        model,
        find_head(causal_lm(model)),
        batch,
        Needs(kv_BT=batch["roles"] != Role.PAD if kv else None),
    )


@pytest.mark.parametrize("side", ["right", "left"])
def test_keys_and_values_are_those_of_the_models_own_cache(
    adapted: Any, items: Items, side: str
) -> None:
    taps = taps_of(adapted, items, side)
    caches = [own_cache(adapted, row) for row, _ in items]
    assert len(taps.kv) == adapted.config.num_hidden_layers
    for layer, pair in enumerate(taps.kv):
        for which, found in enumerate(pair):
            expected = torch.cat([cache[layer][which] for cache in caches])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_kinds_of_attention_give_the_same_cache(attention: str, items: Items) -> None:
    model = tiny("qwen3", attention)
    assert model.config._attn_implementation == attention
    expected = [own_cache(model, row) for row, _ in items]
    for layer, (keys, values) in enumerate(taps_of(model, items).kv):
        torch.testing.assert_close(
            keys, torch.cat([cache[layer][0] for cache in expected]), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            values, torch.cat([cache[layer][1] for cache in expected]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("side", ["right", "left"])
def test_hidden_states_give_the_models_logits(adapted: Any, items: Items, side: str) -> None:
    batch = batch_of(items, side)
    taps = taps_of(adapted, items, side, kv=False)
    assert taps.kv == []
    logits = taps.head(taps.hidden_BTD)
    for at, (row, _) in enumerate(items):
        real = batch["roles"][at] != Role.PAD
        torch.testing.assert_close(logits[at][real], row_logits(adapted, row), rtol=1e-4, atol=1e-4)


def test_only_the_tokens_of_the_mask_are_taken_row_by_row(items: Items) -> None:
    model = tiny("llama")
    batch = batch_of(items, "left")
    mask = (batch["roles"] == Role.POSTFIX) & ~batch["retain"][:, None]
    keys = forward(model, find_head(model), batch, Needs(kv_BT=mask)).kv[1][0]
    expected = [
        own_cache(model, row)[1][0][[r == Role.POSTFIX for r in row.roles]]
        for row, is_retain in items
        if not is_retain
    ]
    torch.testing.assert_close(keys, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_a_key_is_not_the_projection_of_the_raw_residual_stream() -> None:
    """What the published script regularises. Rotation keeps lengths, so lengths are compared."""
    model, row = tiny("llama"), mixed_items()[1][0]
    states = model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
    keys = taps_of(model, [(row, False)]).kv[1][0]
    attention, norm = model.model.layers[1].self_attn, model.model.layers[1].input_layernorm
    raw, normed = attention.k_proj(states[1][0]), attention.k_proj(norm(states[1][0]))
    torch.testing.assert_close(keys.norm(dim=1), normed.norm(dim=1), rtol=1e-4, atol=1e-4)
    assert ((keys.norm(dim=1) - raw.norm(dim=1)).abs() / keys.norm(dim=1)).max() > 0.1


def test_a_key_norm_is_part_of_the_key() -> None:
    model, row = tiny("qwen3"), mixed_items()[1][0]
    states = model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
    attention = model.model.layers[1].self_attn
    projected = attention.k_proj(model.model.layers[1].input_layernorm(states[1][0])).unflatten(
        -1, (-1, 8)
    )
    found = taps_of(model, [(row, False)]).kv[1][0].unflatten(-1, (-1, 8)).norm(dim=-1)
    torch.testing.assert_close(
        found, attention.k_norm(projected).norm(dim=-1), rtol=1e-4, atol=1e-4
    )
    assert (found - projected.norm(dim=-1)).abs().max() > 0.1


def test_prefix_kv_equals_the_cache_of_a_row_that_begins_with_it(adapted: Any) -> None:
    row = mixed_items()[1][0]
    for found, expected in zip(
        prefix_kv(adapted, torch.tensor(PREFIX_A)), own_cache(adapted, row), strict=True
    ):
        for ours, naive in zip(found, expected):
            assert ours.shape == (len(PREFIX_A), 16)
            assert not ours.requires_grad
            torch.testing.assert_close(ours, naive[: len(PREFIX_A)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpointing_changes_neither_keys_nor_gradients(method: str, items: Items) -> None:
    results = []
    for checkpointing in (False, True):
        model = with_lora(tiny("qwen3")) if method == "lora" else tiny("qwen3")
        model.train()
        if checkpointing:
            causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
        taps = taps_of(model, items)
        total = (
            sum((keys.pow(2) + values.pow(3)).sum() for keys, values in taps.kv)
            + taps.hidden_BTD.pow(2).sum()
        )
        results.append(({"total": total.detach()}, gradients(total, model)))
    assert_same(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_reentrant_checkpointing_raises(method: str, items: Items) -> None:
    model = with_lora(tiny("llama")) if method == "lora" else tiny("llama")
    model.train()
    causal_lm(model).gradient_checkpointing_enable({"use_reentrant": True})
    causal_lm(model).enable_input_require_grads()
    with pytest.raises(DefenseError, match="re-entrant"):
        taps_of(model, items)


def test_a_trained_weight_behind_all_keys_raises(items: Items) -> None:
    model = tiny("llama").requires_grad_(False)
    model.model.norm.requires_grad_()
    with pytest.raises(DefenseError, match="no gradient"):
        taps_of(model, items)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_functions_are_put_back_even_after_an_error(
    attention: str, items: Items
) -> None:
    before = dict(ALL_ATTENTION_FUNCTIONS)
    model = tiny("llama", attention)
    taps_of(model, items)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    hooks = _hooks(model)
    batch = {**batch_of(items), "input_ids": torch.full_like(batch_of(items)["input_ids"], 10**6)}
    with pytest.raises(IndexError):
        forward(model, find_head(model), batch, Needs(kv_BT=batch["roles"] != Role.PAD))
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert _hooks(model) == hooks


def _hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


# ---------------------------------------------------------------- reference


def test_the_reference_of_an_adapted_model_is_the_model_without_adapter(
    adapted: Any, architecture: str, items: Items
) -> None:
    batch = batch_of(items)
    reference = Reference(adapted).taps(
        batch, Needs(batch["roles"] != Role.PAD, batch["roles"] != Role.PAD)
    )
    untouched, student = taps_of(tiny(architecture), items), taps_of(adapted, items)
    real = batch["roles"] != Role.PAD
    torch.testing.assert_close(reference.hidden_BTD[real], untouched.hidden_BTD[real])
    assert (reference.hidden_BTD[real] - student.hidden_BTD[real]).abs().max() > 0.01
    for found, expected in zip(reference.kv, untouched.kv, strict=True):
        torch.testing.assert_close(found, expected)
    assert not reference.hidden_BTD.requires_grad


def test_the_reference_of_a_full_model_stays_the_starting_weights(items: Items) -> None:
    model = tiny("llama").train()
    reference = Reference(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taps_of(model, items).hidden_BTD.pow(2).mean().backward()
    optimizer.step()
    batch = batch_of(items)
    found = reference.taps(batch, Needs(batch["roles"] != Role.PAD, batch["roles"] != Role.PAD))
    untouched, real = taps_of(tiny("llama"), items), batch["roles"] != Role.PAD
    torch.testing.assert_close(found.hidden_BTD[real], untouched.hidden_BTD[real])
    torch.testing.assert_close(
        found.head(found.hidden_BTD[real]), untouched.head(untouched.hidden_BTD[real])
    )
    torch.testing.assert_close(found.kv, untouched.kv)
    assert (taps_of(model, items).hidden_BTD[real] - found.hidden_BTD[real]).abs().max() > 0.01


def test_remembered_prefixes_equal_a_forward_over_the_rows(items: Items) -> None:
    for model in (with_lora(tiny("qwen3")), tiny("qwen3")):
        batch = batch_of(items, "left")
        mask = (batch["roles"] == Role.PREFIX) & ~batch["retain"][:, None]
        reference = Reference(model)
        if not is_adapted(model):
            nudged(model)
        expected = reference.taps(batch, Needs(batch["roles"] != Role.PAD, mask)).kv
        for _ in range(2):
            torch.testing.assert_close(
                reference.taps(batch, Needs(kv_BT=mask)).kv, expected, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("training", [True, False])
def test_the_reference_leaves_mode_and_adapter_as_they_were(
    llama_lora: Any, items: Items, training: bool
) -> None:
    llama_lora.train(training)
    reference = Reference(llama_lora)
    with reference.active() as model, torch.no_grad():
        assert not model.training
    assert llama_lora.training is training
    assert (
        taps_of(llama_lora, items).hidden_BTD - taps_of(tiny("llama"), items).hidden_BTD
    ).abs().max() > 0.01


def test_a_frozen_copy_of_an_adapter_is_the_reference_of_its_further_training(
    items: Items, tmp_path: Path
) -> None:
    with_lora(tiny("llama"), seed=5).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    model.load_adapter(tmp_path, adapter_name=ADAPTER)
    start = with_lora(tiny("llama"), seed=5)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(0.05 * torch.randn_like(parameter))
    batch, real = batch_of(items), batch_of(items)["roles"] != Role.PAD
    found = Reference(model).taps(batch, Needs(real, real))
    torch.testing.assert_close(found.hidden_BTD[real], taps_of(start, items).hidden_BTD[real])
    torch.testing.assert_close(found.kv, taps_of(start, items).kv)
    assert (taps_of(model, items).hidden_BTD[real] - found.hidden_BTD[real]).abs().max() > 0.01
    assert [
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    ] == trained
    assert not any(ADAPTER in name for name in trained)


@pytest.mark.parametrize("side", ["right", "left"])
def test_states_are_the_residual_stream_after_their_layer(
    architecture: str, side: str, items: Items
) -> None:
    model = tiny(architecture, layers=3)
    batch = batch_of(items, side)
    taps = forward(
        model, find_head(model), batch, Needs(states_BT=batch["roles"] != Role.PAD, layers=(1, 3))
    )
    assert sorted(taps.states) == [1, 3]
    streams = []
    for row, _ in items:
        with torch.no_grad(), residual_stream(model) as stream:
            model(input_ids=torch.tensor([row.input_ids]))
        streams.append(stream)
    for layer in (1, 3):
        expected = torch.cat([stream[layer] for stream in streams])
        torch.testing.assert_close(taps.states[layer], expected, rtol=1e-4, atol=1e-4)
