"""What a forward pass may be asked for: the final hidden states, and the true keys and values at chosen tokens.

One forward serves all that ask. Keys and values are taken where the attention function receives them: after the
layer's input norm, the projection with its adapters, any key norm and the rotary embedding; that is what the model's
own cache holds. Works under (non-re-entrant) activation checkpointing, where the cache itself is off. Does not know
defenses.

Shapes: B rows, T tokens, D hidden size, N chosen tokens (row by row), E = key heads x head size.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import DefenseError
from .losses import Head


@dataclass
class Taps:
    """What one forward gave. `kv[l]` = (keys [N, E], values [N, E]) of layer l at the tokens of `kv_mask_BT`."""

    head: Head
    hidden_BTD: Tensor
    kv_mask_BT: Tensor | None = None
    kv: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def causal_lm(model: Any) -> Any:
    """The plain transformers model inside DDP and peft wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward(model: nn.Module, head: Head, batch: dict[str, Tensor], kv_mask_BT: Tensor | None = None) -> Taps:
    """One forward of `model` on `batch` (input_ids, attention_mask, position_ids), with what was asked.

    Raises:
        DefenseError: keys were asked for and no attention layer gave them, or they carry no gradient although the
            model trains (re-entrant checkpointing does that): a penalty on them would silently be zero.
    """
    inner = causal_lm(model)
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        # None: the losses make the logits they need, in tiles.
        inputs["logits_to_keep"] = batch["input_ids"].new_zeros(0)
    with _last_hidden_state(inner) as hidden, _keys_and_values(inner, kv_mask_BT is not None) as layers:
        model(**inputs, use_cache=False)
    kv = []
    if kv_mask_BT is not None:
        kv = [_at(layers[index], kv_mask_BT) for index in sorted(layers)]
        _check_kv(kv, inner, hidden[0].requires_grad)
    return Taps(head, hidden[0], kv_mask_BT, kv)


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
def _last_hidden_state(inner: Any) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    handle = inner.get_decoder().register_forward_hook(lambda _m, _a, output: found.append(output[0]))
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _keys_and_values(inner: Any, wanted: bool) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Collects, by layer, the keys and values [B, heads, T, size] that attention functions receive.

    They are kept whole: work done on them here, inside a checkpointed layer, would be missing from its recomputation
    (which happens after the context has closed, so nothing is collected twice).
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    if not wanted:
        yield found
        return
    name = inner.config._attn_implementation
    plain = ALL_ATTENTION_FUNCTIONS.get(name)

    def recording(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        found[module.layer_idx] = (key, value)
        attention = plain or sys.modules[type(module).__module__].eager_attention_forward
        return attention(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = recording
    try:
        yield found
    finally:
        if plain is None:
            del ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-untyped-call]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = plain


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
