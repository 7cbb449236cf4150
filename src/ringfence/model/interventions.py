"""Hooks that see or change hidden states, keys and values in a forward pass.

Shapes: B rows, T tokens, H heads, D hidden size, E head size, N chosen tokens.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layers import causal_lm, decoder_layers

SeeKV = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
# (plain attention function, module, query, key, value, mask, options)
AroundAttention = Callable[..., Any]


@contextmanager
def layer_outputs(modules: dict[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Collects the (first) output of each module. It is kept whole, see `keys_and_values`."""
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
def keys_and_values(inner: Any, wanted: bool) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Collects, by layer, the keys and values [B, heads, T, size] that attention functions receive.

    They are kept whole: work done on them here, inside a checkpointed layer, would be missing from
    its recomputation (which happens after the context has closed, so nothing is collected twice).
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found[layer] = (key, value)
        return key, value

    with around_attention(inner, _seeing_kv(keep)) if wanted else nullcontext():
        yield found


@contextmanager
def around_attention(inner: Any, around: AroundAttention) -> Iterator[None]:
    """Calls `around` in place of the model's attention function, which it receives. Contexts nest:
    the one opened last is called first."""
    name = inner.config._attn_implementation
    plain = ALL_ATTENTION_FUNCTIONS.get(name)

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        own = plain or sys.modules[type(module).__module__].eager_attention_forward
        return around(own, module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield
    finally:
        if plain is None:
            del ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-untyped-call]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = plain


def _seeing_kv(see: SeeKV) -> AroundAttention:
    """Attention functions get the keys and values that `see(layer from 0, key, value)` returns."""

    def around(
        plain: Any,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return plain(module, query, *see(module.layer_idx, key, value), *args, **kwargs)

    return around


@contextmanager
def patched_kv(model: Any, kv: list[tuple[Tensor, Tensor]], mask_BT: Tensor) -> Iterator[None]:
    """In forwards without a cache, attention reads other keys and values at the N tokens of the
    mask.

    `kv[l]` = (keys [N, E], values [N, E]) of layer l, as in `Taps.kv`. Tokens after a patched one
    see the patch in every layer; the residual stream at the token itself is unchanged.
    """

    def put(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return _put(key, kv[layer][0], mask_BT), _put(value, kv[layer][1], mask_BT)

    with around_attention(causal_lm(model), _seeing_kv(put)):
        yield


def _put(states_BHTE: Tensor, new_NE: Tensor, mask_BT: Tensor) -> Tensor:
    """States [B, heads, T, size] with those at the tokens of the mask replaced by rows of heads *
    size."""
    patched_BTHE = states_BHTE.transpose(1, 2).clone()
    patched_BTHE[mask_BT] = new_NE.to(patched_BTHE).unflatten(1, patched_BTHE.shape[2:])
    return patched_BTHE.transpose(1, 2)


@contextmanager
def patched_states(model: Any, layer: int, states_ND: Tensor, mask_BT: Tensor) -> Iterator[None]:
    """In forwards without a cache, the residual stream after `layer` (from 1) is `states_ND` at the
    N tokens of the mask."""

    def put(hidden_BTD: Tensor) -> Tensor:
        patched_BTD = hidden_BTD.clone()
        patched_BTD[mask_BT] = states_ND.to(patched_BTD)
        return patched_BTD

    with edited_states(model, layer, put):
        yield


@contextmanager
def edited_states(model: Any, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In forwards, `edit` replaces the residual stream [B, T, D] after `layer` (from 1)."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return edit(output)
        return edit(output[0]), *output[1:]

    handle = decoder_layers(model)[layer - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
