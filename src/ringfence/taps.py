"""What a forward pass may be asked for: the final hidden states, the residual stream after chosen layers, and the true
keys and values, at chosen tokens; and what may be put in their place.

One forward serves all that ask. Keys and values are taken where the attention function receives them: after the
layer's input norm, the projection with its adapters, any key norm and the rotary embedding; that is what the model's
own cache holds. Works under (non-re-entrant) activation checkpointing, where the cache itself is off. Does not know
defenses.

Shapes: B rows, T tokens, D hidden size, N chosen tokens (row by row), E = key heads x head size.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import DefenseError
from .losses import Head, TopK

SeeKV = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Needs:
    """What is wanted from a forward of a batch; masks are [B, T], None where nothing is wanted.

    hidden_BT: tokens whose final hidden states (after the last norm) are compared; kv_BT: tokens whose keys and values
    are; states_BT: tokens whose residual stream after each of `layers` (1 to the number of layers) is.
    """

    hidden_BT: Tensor | None = None
    kv_BT: Tensor | None = None
    states_BT: Tensor | None = None
    layers: tuple[int, ...] = ()

    def rows_B(self) -> Tensor | None:
        """Rows in which anything is wanted."""
        mask = _either(_either(self.hidden_BT, self.kv_BT), self.states_BT)
        return None if mask is None else mask.any(1)

    def of_rows(self, rows_B: Tensor) -> "Needs":
        hidden, kv, states = (
            None if mask is None else mask[rows_B] for mask in (self.hidden_BT, self.kv_BT, self.states_BT)
        )
        return Needs(hidden, kv, states, self.layers)

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            _either(self.hidden_BT, other.hidden_BT),
            _either(self.kv_BT, other.kv_BT),
            _either(self.states_BT, other.states_BT),
            tuple(sorted({*self.layers, *other.layers})),
        )


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a | b


@dataclass
class Taps:
    """What one forward gave.

    `kv[l]` = (keys [N, E], values [N, E]) of layer l at the tokens of `needs.kv_BT`; `states[l]` = residual stream
    [N, D] after layer l (from 1) at those of `needs.states_BT`. `top_k` may stand in for a reference's final hidden
    states: its most probable next tokens at the tokens of `needs.hidden_BT`, row by row; hidden_BTD may then be empty.
    """

    head: Head
    hidden_BTD: Tensor
    needs: Needs = Needs()
    kv: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    states: dict[int, Tensor] = field(default_factory=dict)
    top_k: TopK | None = None


def causal_lm(model: Any) -> Any:
    """The plain transformers model inside DDP and peft wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers, first to last."""
    inner = causal_lm(model)
    number = inner.config.get_text_config().num_hidden_layers
    lists = (m for m in inner.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == number)
    return next(lists)


def forward(model: nn.Module, head: Head, batch: dict[str, Tensor], needs: Needs = Needs(), prefix: Any = None) -> Taps:
    """One forward of `model` on `batch` (input_ids, attention_mask, position_ids), with what was asked.

    `prefix` is a transformers cache of the tokens that all rows begin with. They are not computed again: their hidden
    states are zero here.

    Raises:
        DefenseError: keys were asked for and no attention layer gave them, or they carry no gradient although the
            model trains (re-entrant checkpointing does that): a penalty on them would silently be zero.
    """
    inner = causal_lm(model)
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    start = 0
    if prefix is not None:
        start = prefix.get_seq_length()
        inputs |= {name: inputs[name][:, start:] for name in ("input_ids", "position_ids")}
        inputs["past_key_values"] = prefix
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        # None: the losses make the logits they need, in tiles.
        inputs["logits_to_keep"] = batch["input_ids"].new_zeros(0)
    with (
        _outputs({0: inner.get_decoder()}) as decoder,
        _outputs({number: decoder_layers(model)[number - 1] for number in needs.layers}) as layers,
        _keys_and_values(inner, needs.kv_BT is not None) as found,
    ):
        model(**inputs, use_cache=False)
    taps = Taps(head, F.pad(decoder[0], (0, 0, start, 0)), needs)
    if needs.kv_BT is not None:
        taps.kv = [_at(found[index], needs.kv_BT) for index in sorted(found)]
        _check_kv(taps.kv, inner, taps.hidden_BTD.requires_grad)
    if needs.states_BT is not None:
        taps.states = {number: F.pad(layers[number], (0, 0, start, 0))[needs.states_BT] for number in needs.layers}
    return taps


def _check_kv(kv: list[tuple[Tensor, Tensor]], inner: Any, trains: bool) -> None:
    name = type(inner).__name__
    if not kv:
        raise DefenseError(
            f"{name}: no attention layer passed keys and values through transformers' attention interface"
        )
    if trains and not any(tensor.requires_grad for pair in kv for tensor in pair):
        raise DefenseError(
            f"{name}: keys and values carry no gradient. Either no trained weight stands before them, or re-entrant "
            "activation checkpointing cut them off (use_reentrant=False is needed)"
        )


@contextmanager
def _outputs(modules: dict[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Collects the (first) output of each module. It is kept whole, see `_keys_and_values`."""
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            found[number] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [module.register_forward_hook(keep(number)) for number, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _keys_and_values(inner: Any, wanted: bool) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Collects, by layer, the keys and values [B, heads, T, size] that attention functions receive.

    They are kept whole: work done on them here, inside a checkpointed layer, would be missing from its recomputation
    (which happens after the context has closed, so nothing is collected twice).
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found[layer] = (key, value)
        return key, value

    with _attention(inner, keep) if wanted else nullcontext():
        yield found


@contextmanager
def _attention(inner: Any, see: SeeKV) -> Iterator[None]:
    """Attention functions get the keys and values that `see(layer from 0, key, value)` gives back. Contexts nest: the
    one opened last sees first."""
    name = inner.config._attn_implementation
    plain = ALL_ATTENTION_FUNCTIONS.get(name)

    def seeing(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = see(module.layer_idx, key, value)
        attention = plain or sys.modules[type(module).__module__].eager_attention_forward
        return attention(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = seeing
    try:
        yield
    finally:
        if plain is None:
            del ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-untyped-call]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = plain


@contextmanager
def patched_kv(model: Any, kv: list[tuple[Tensor, Tensor]], mask_BT: Tensor) -> Iterator[None]:
    """In forwards without a cache, attention reads other keys and values at the N tokens of the mask.

    `kv[l]` = (keys [N, E], values [N, E]) of layer l, as `Taps.kv` gives them. What stands behind a patched token sees
    the patch in every layer; the residual stream at the token itself goes on as it was.
    """

    def put(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return _put(key, kv[layer][0], mask_BT), _put(value, kv[layer][1], mask_BT)

    with _attention(causal_lm(model), put):
        yield


def _put(states_BHTE: Tensor, new_NE: Tensor, mask_BT: Tensor) -> Tensor:
    """States [B, heads, T, size] with those at the tokens of the mask replaced by rows of heads * size."""
    patched_BTHE = states_BHTE.transpose(1, 2).clone()
    patched_BTHE[mask_BT] = new_NE.to(patched_BTHE).unflatten(1, patched_BTHE.shape[2:])
    return patched_BTHE.transpose(1, 2)


@contextmanager
def patched_states(model: Any, layer: int, states_ND: Tensor, mask_BT: Tensor) -> Iterator[None]:
    """In forwards without a cache, the residual stream after `layer` (from 1) is `states_ND` at the N tokens of the
    mask."""

    def put(hidden_BTD: Tensor) -> Tensor:
        patched_BTD = hidden_BTD.clone()
        patched_BTD[mask_BT] = states_ND.to(patched_BTD)
        return patched_BTD

    with edited_states(model, layer, put):
        yield


@contextmanager
def edited_states(model: Any, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In forwards, the residual stream [B, T, D] after `layer` (from 1) is what `edit` makes of it."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return edit(output)
        return edit(output[0]), *output[1:]

    handle = decoder_layers(model)[layer - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _at(pair: tuple[Tensor, Tensor], mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, heads, T, size] -> [N, heads * size] at the tokens of the mask."""
    key, value = (states.transpose(1, 2)[mask_BT].flatten(1) for states in pair)
    return key, value


def prefix_kv(model: nn.Module, prefix_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [P, E] of each layer for a prefix alone ([P] ids); by causality those of every row with it."""
    inner = causal_lm(model)
    ids = prefix_ids[None]
    with torch.no_grad(), _keys_and_values(inner, True) as layers:
        model(input_ids=ids, use_cache=False)
    return [_at(layers[index], torch.ones_like(ids, dtype=torch.bool)) for index in sorted(layers)]
