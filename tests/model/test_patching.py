"""What replaces a model's own activations: its own change nothing, the reference's do what the
reference's cache does, and nothing stays behind."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.models import nudged, tiny, with_lora
from helpers.naive import residual_stream
from helpers.rows import Items, batch_of
from ringfence.model.interventions import patched_kv, patched_states
from ringfence.model.layers import cache_in, cache_name, causal_lm
from ringfence.model.losses import Head
from ringfence.model.taps import Needs, Taps, forward
from ringfence.text.roles import Role

pytestmark = pytest.mark.slow

SIDES = ("right", "left")


def taken(model: Any, batch: dict[str, Tensor], mask_BT: Tensor | None, *layers: int) -> Taps:
    needs = Needs() if mask_BT is None else Needs(kv_BT=mask_BT, states_BT=mask_BT, layers=layers)
    with torch.no_grad():
        return forward(model, Head(causal_lm(model).get_output_embeddings()), batch, needs)


def tuned_model(architecture: str, seed: int = 2, **sizes: int) -> Any:
    return nudged(tiny(architecture, **sizes), seed=seed, size=0.1)


def of_roles(batch: dict[str, Tensor], *roles: Role) -> Tensor:
    return torch.stack([batch["roles"] == role for role in roles]).any(0)


PROMPT = (Role.PREFIX, Role.QUERY, Role.POSTFIX)


# ---------------------------------------------------------------- a model's own


@pytest.mark.parametrize("side", SIDES)
def test_a_models_own_activations_change_nothing(adapted: Any, items: Items, side: str) -> None:
    batch = batch_of(items, side)
    mask = of_roles(batch, Role.QUERY, Role.POSTFIX)
    before = taken(adapted, batch, mask, 1, 2)
    with ExitStack() as stack:
        stack.enter_context(patched_kv(adapted, before.kv, mask))
        for layer, states in before.states.items():
            stack.enter_context(patched_states(adapted, layer, states, mask))
        torch.testing.assert_close(
            taken(adapted, batch, None).hidden_BTD, before.hidden_BTD, rtol=0, atol=0
        )


def test_no_token_is_patched_by_an_empty_mask(items: Items) -> None:
    model, batch = tiny("llama"), batch_of(items)
    none = torch.zeros_like(batch["roles"], dtype=torch.bool)
    other = taken(tuned_model("llama"), batch, none, 1)
    before = taken(model, batch, None).hidden_BTD
    with patched_kv(model, other.kv, none), patched_states(model, 1, other.states[1], none):
        torch.testing.assert_close(taken(model, batch, None).hidden_BTD, before, rtol=0, atol=0)


# ---------------------------------------------------------------- another model's


@pytest.mark.parametrize("side", SIDES)
def test_a_patched_prefix_equals_the_references_cache_of_it(
    architecture: str, items: Items, side: str
) -> None:
    reference, tuned = tiny(architecture), tuned_model(architecture)
    batch = batch_of(items, side)
    mask = of_roles(batch, Role.PREFIX)
    with patched_kv(tuned, taken(reference, batch, mask).kv, mask):
        found = taken(tuned, batch, None).hidden_BTD
    plain = taken(tuned, batch, None).hidden_BTD
    for at, (row, _) in enumerate(items):
        ids, start = torch.tensor([row.input_ids]), row.roles.count(Role.PREFIX)
        with torch.no_grad():
            cache = cache_in(reference(input_ids=ids[:, :start], use_cache=True))
            expected = tuned.model(
                input_ids=ids[:, start:], **{cache_name(tuned.model): cache}
            ).last_hidden_state[0]
        behind = batch["roles"][at] != Role.PAD
        torch.testing.assert_close(found[at][behind][start:], expected, rtol=1e-4, atol=1e-4)
        assert (plain[at][behind][start:] - expected).abs().max() > 0.05


@pytest.mark.parametrize("side", SIDES)
def test_keys_and_values_in_the_middle_are_read_by_all_behind_them(
    architecture: str, items: Items, side: str
) -> None:
    """Against a cache that is cut and mended by hand: prefix of the tuned model, query of the
    reference (which saw its own prefix), and the rest fed behind it."""
    reference, tuned = tiny(architecture), tuned_model(architecture)
    rows = [item for item in items if Role.TEMPLATE not in item[0].roles]
    batch = batch_of(rows, side)
    mask = of_roles(batch, Role.QUERY)
    with patched_kv(tuned, taken(reference, batch, mask).kv, mask):
        found = taken(tuned, batch, None).hidden_BTD
    for at, (row, _) in enumerate(rows):
        ids = torch.tensor([row.input_ids])
        start, end = row.roles.index(Role.QUERY), row.roles.index(Role.POSTFIX)
        with torch.no_grad():
            own, other = (
                cache_in(m(input_ids=ids[:, :end], use_cache=True)) for m in (tuned, reference)
            )
            mended = DynamicCache()
            for number, (mine, theirs) in enumerate(zip(own.layers, other.layers)):
                pairs = (mine.keys, theirs.keys), (mine.values, theirs.values)
                parts = [torch.cat([a[:, :, :start], b[:, :, start:end]], 2) for a, b in pairs]
                mended.update(*parts, number)
            expected = tuned.model(
                input_ids=ids[:, end:], **{cache_name(tuned.model): mended}
            ).last_hidden_state[0]
        torch.testing.assert_close(
            found[at][batch["roles"][at] != Role.PAD][end:], expected, rtol=1e-4, atol=1e-4
        )


def test_tokens_before_a_patch_and_other_rows_stay_as_they_were(items: Items) -> None:
    reference, tuned, batch = tiny("llama"), tuned_model("llama"), batch_of(items)
    mask = of_roles(batch, Role.POSTFIX)
    mask[1:] = False
    plain = taken(tuned, batch, None).hidden_BTD
    other = taken(reference, batch, mask, 1)
    for context in (
        patched_kv(tuned, other.kv, mask),
        patched_states(tuned, 1, other.states[1], mask),
    ):
        with context:
            found = taken(tuned, batch, None).hidden_BTD
        first = int(mask[0].nonzero()[0])
        torch.testing.assert_close(found[1:], plain[1:], rtol=0, atol=0)
        torch.testing.assert_close(found[0, :first], plain[0, :first], rtol=0, atol=0)
        assert (found[0, first:] - plain[0, first:]).abs().max() > 0.01


def test_a_whole_row_from_the_reference_is_the_reference(architecture: str, items: Items) -> None:
    """All keys and values are not enough (queries and MLPs stay tuned); the residual stream after
    the last layer is, up to the last norm."""
    reference, tuned, batch = tiny(architecture), tuned_model(architecture), batch_of(items)
    tuned.model.norm.load_state_dict(reference.model.norm.state_dict())
    real = batch["roles"] != Role.PAD
    wanted = taken(reference, batch, real, 2)
    with patched_states(tuned, 2, wanted.states[2], real):
        found = taken(tuned, batch, None).hidden_BTD
    torch.testing.assert_close(found[real], wanted.hidden_BTD[real], rtol=1e-4, atol=1e-4)
    with patched_kv(tuned, wanted.kv, real):
        assert (
            taken(tuned, batch, None).hidden_BTD[real] - wanted.hidden_BTD[real]
        ).abs().max() > 0.05


@pytest.mark.parametrize("side", SIDES)
def test_a_patched_residual_stream_equals_a_hook_row_by_row(
    architecture: str, items: Items, side: str
) -> None:
    reference, tuned = tiny(architecture, layers=3), tuned_model(architecture, layers=3)
    batch = batch_of(items, side)
    mask = of_roles(batch, Role.QUERY)
    with patched_states(tuned, 2, taken(reference, batch, mask, 2).states[2], mask):
        found = taken(tuned, batch, None).hidden_BTD
    for at, (row, _) in enumerate(items):
        ids, chosen = torch.tensor([row.input_ids]), [role == Role.QUERY for role in row.roles]
        with torch.no_grad(), residual_stream(reference) as stream:
            reference(input_ids=ids)

        def put(
            _module: Any, args: Any, kwargs: Any, stream: Any = stream, chosen: Any = chosen
        ) -> Any:
            hidden = args[0].clone()
            hidden[0, chosen] = stream[2][chosen]
            return (hidden, *args[1:]), kwargs

        handle = tuned.model.layers[2].register_forward_pre_hook(put, with_kwargs=True)
        with torch.no_grad():
            expected = tuned.model(input_ids=ids).last_hidden_state[0]
        handle.remove()
        torch.testing.assert_close(
            found[at][batch["roles"][at] != Role.PAD], expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kinds_of_attention_agree(attention: str, items: Items) -> None:
    reference, batch = tiny("qwen3"), batch_of(items)
    mask = of_roles(batch, *PROMPT)
    kv = taken(reference, batch, mask).kv
    found = []
    for kind in ("sdpa", attention):
        tuned = nudged(tiny("qwen3", kind), size=0.1)
        assert tuned.config._attn_implementation == kind
        with patched_kv(tuned, kv, mask):
            found.append(taken(tuned, batch, None).hidden_BTD[batch["roles"] != Role.PAD])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_activations_of_another_precision_are_cast(items: Items) -> None:
    reference, tuned, batch = tiny("llama").bfloat16(), tuned_model("llama"), batch_of(items)
    mask = of_roles(batch, Role.PREFIX)
    other = taken(reference, batch, mask, 1)
    assert other.kv[0][0].dtype == torch.bfloat16
    with patched_kv(tuned, other.kv, mask), patched_states(tuned, 1, other.states[1], mask):
        assert taken(tuned, batch, None).hidden_BTD.dtype == torch.float32


def test_the_tensors_that_are_put_in_stay_as_they_were(items: Items) -> None:
    model, batch = tiny("llama"), batch_of(items)
    mask = of_roles(batch, Role.PREFIX)
    other = taken(tuned_model("llama"), batch, mask, 1)
    copies = [(k.clone(), v.clone()) for k, v in other.kv], other.states[1].clone()
    with patched_kv(model, other.kv, mask), patched_states(model, 1, other.states[1], mask):
        taken(model, batch, None)
    torch.testing.assert_close((other.kv, other.states[1]), copies, rtol=0, atol=0)


# ---------------------------------------------------------------- nesting, and going away


def test_keys_asked_for_under_a_patch_are_the_models_own_below_it(items: Items) -> None:
    """A forward that asks for keys opens last, so it sees them before they are replaced: those of
    the first layer are as without a patch, those of the second come from what the patch did to the
    first."""
    reference, tuned, batch = tiny("gemma2"), tuned_model("gemma2"), batch_of(items)
    prefix, behind = (
        of_roles(batch, Role.PREFIX),
        of_roles(batch, Role.QUERY, Role.POSTFIX, Role.RESPONSE),
    )
    plain = taken(tuned, batch, prefix | behind).kv
    with patched_kv(tuned, taken(reference, batch, prefix).kv, prefix):
        under = taken(tuned, batch, prefix | behind).kv
    torch.testing.assert_close(under[0], plain[0], rtol=0, atol=0)
    is_behind = behind[prefix | behind]
    assert (under[1][0] - plain[1][0])[is_behind].abs().max() > 0.01


def test_two_roles_patched_one_in_the_other_are_both_patched(items: Items) -> None:
    reference, tuned, batch = tiny("qwen3"), tuned_model("qwen3"), batch_of(items)
    prefix, query = of_roles(batch, Role.PREFIX), of_roles(batch, Role.QUERY)

    def patched(mask: Tensor) -> Any:
        return patched_kv(tuned, taken(reference, batch, mask).kv, mask)

    with patched(prefix | query):
        at_once = taken(tuned, batch, None).hidden_BTD
    for outer, inner in ((prefix, query), (query, prefix)):
        first, second = patched(outer), patched(inner)  # taken before either stands
        with first, second:
            torch.testing.assert_close(taken(tuned, batch, None).hidden_BTD, at_once)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(architecture: str, fails: bool, items: Items) -> None:
    reference, tuned, batch = tiny(architecture), tuned_model(architecture), batch_of(items)
    mask = of_roles(batch, *PROMPT)
    other, plain = taken(reference, batch, mask, 1), taken(tuned, batch, None).hidden_BTD
    functions, hooks = dict(ALL_ATTENTION_FUNCTIONS), _hooks(tuned)
    bad = {**batch, "input_ids": torch.full_like(batch["input_ids"], 10**6)} if fails else batch
    with ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(IndexError))
        stack.enter_context(patched_kv(tuned, other.kv, mask))
        stack.enter_context(patched_states(tuned, 1, other.states[1], mask))
        assert _hooks(tuned) > hooks
        assert dict(ALL_ATTENTION_FUNCTIONS) != functions
        taken(tuned, bad, None)
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert _hooks(tuned) == hooks
    torch.testing.assert_close(taken(tuned, batch, None).hidden_BTD, plain, rtol=0, atol=0)


def test_the_adapter_of_a_patched_model_works_on(items: Items) -> None:
    """Reference and tuned model may be one set of weights: keys of the model without its adapter,
    put into it with."""
    model, batch = with_lora(tiny("llama"), size=0.3), batch_of(items)
    mask = of_roles(batch, Role.PREFIX)
    with model.disable_adapter():
        kv = taken(model, batch, mask).kv
    with patched_kv(model, kv, mask):
        found = taken(model, batch, None).hidden_BTD
    merged = with_lora(tiny("llama"), size=0.3).merge_and_unload()
    with patched_kv(merged, taken(tiny("llama"), batch, mask).kv, mask):
        expected = taken(merged, batch, None).hidden_BTD
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - taken(model, batch, None).hidden_BTD).abs().max() > 0.05


def _hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())
