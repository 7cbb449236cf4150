"""What a forward pass can give: the final hidden states, the residual stream after chosen layers,
and the true keys and values, at chosen tokens.

One forward serves all that ask. Keys and values are taken where the attention function receives
them: after the layer's input norm, the projection with its adapters, any key norm and the rotary
embedding; that is what the model's own cache holds. This works under (non-re-entrant) activation
checkpointing, where the cache itself is off. Does not know defenses.

A batch is padded. How it is computed is its *layout*, which does not change the results:
- padded: as it is;
- packed: all rows one after another in one row, without padding;
- shared: as packed, with the tokens that begin every row included only once. In the last two,
attention is still computed row by row.

Shapes: B rows, T tokens, D hidden size, N chosen tokens (row by row), E = key heads x head size.
"""

import copy
import inspect
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.generic import is_flash_attention_requested

from ..errors import DefenseError, ModelError
from .interventions import AroundAttention, around_attention, keys_and_values, layer_outputs
from .layers import cache_name, causal_lm, decoder_layers
from .losses import Head, TopK

Layout = Literal["padded", "packed", "shared"]


@dataclass(frozen=True)
class Needs:
    """What is wanted from a batch's forward; masks are [B, T], None if nothing is wanted.

    hidden_BT: tokens whose final hidden states (after the last norm) are compared. kv_BT: tokens
    whose keys and values are compared. states_BT: tokens whose residual stream is compared, after
    each of `layers` (from 1 to the number of layers).
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
            None if mask is None else mask[rows_B]
            for mask in (self.hidden_BT, self.kv_BT, self.states_BT)
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
    """The results of one forward.

    `kv[l]` = (keys [N, E], values [N, E]) of layer l at the tokens of `needs.kv_BT`; `states[l]` =
    residual stream [N, D] after layer l (from 1) at those of `needs.states_BT`. `top_k` may replace
    a reference's final hidden states: its most probable next tokens at the tokens of
    `needs.hidden_BT`, row by row; hidden_BTD may then be empty.
    """

    head: Head
    hidden_BTD: Tensor
    needs: Needs = Needs()
    kv: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    states: dict[int, Tensor] = field(default_factory=dict)
    top_k: TopK | None = None


@dataclass(frozen=True)
class CommonPrefix:
    """The P tokens that begin every row of a batch, computed as one row.

    Attributes:
        cache: their keys and values, as transformers keeps them.
        hidden_1PD: final hidden states.
        states: residual stream [1, P, D] after the requested layers.
    """

    cache: DynamicCache
    hidden_1PD: Tensor
    states: dict[int, Tensor]

    def cache_of(self, rows: int) -> DynamicCache:
        """A cache for this number of rows, which may grow. The rows' gradients add up in the one
        row."""
        wide = copy.copy(self.cache)
        layers: list[Any] = [copy.copy(layer) for layer in self.cache.layers]
        for layer in layers:
            layer.keys, layer.values = (
                states.expand(rows, -1, -1, -1) for states in (layer.keys, layer.values)
            )
        wide.layers = layers
        return wide


@dataclass(frozen=True)
class Flat:
    """The tokens of a batch that are computed, one after another.

    Attributes:
        index_N: the place of each in the batch, counted row by row.
        at_BT: for each token of the batch, its number among them; at padding, the first.
        shared: number of first tokens that begin every row.
    """

    index_N: Tensor
    at_BT: Tensor
    shared: int

    @classmethod
    def of(cls, batch: dict[str, Tensor], share: bool) -> "Flat":
        ids_BT, real_BT = batch["input_ids"], batch["attention_mask"].bool()
        common_T = ((ids_BT == ids_BT[0]) & real_BT).all(0)
        shared = int(common_T.int().cumprod(0).sum()) if share else 0
        computed_BT = real_BT.clone()
        computed_BT[1:, :shared] = False
        at_BT = (computed_BT.flatten().cumsum(0) - 1).view_as(real_BT).masked_fill(~real_BT, 0)
        at_BT[:, :shared] = at_BT[0, :shared].clone()
        return cls(computed_BT.flatten().nonzero()[:, 0], at_BT, shared)

    def to_rows(self, states_NX: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...]; values at padding must not be used."""
        rows: Tensor = _ToRows.apply(states_NX, self)  # type: ignore[no-untyped-call]
        return rows

    def from_rows(self, states_BTX: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]"""
        return states_BTX.flatten(0, 1).index_select(0, self.index_N)


class _ToRows(torch.autograd.Function):
    """Indexing with a fixed order of sums in its backward pass, which plain indexing lacks on a
    GPU."""

    @staticmethod
    def forward(ctx: Any, states_NX: Tensor, flat: Flat) -> Tensor:
        ctx.flat = flat
        return states_NX.index_select(0, flat.at_BT.flatten()).unflatten(0, flat.at_BT.shape)

    @staticmethod
    def backward(ctx: Any, grad_BTX: Tensor) -> tuple[Tensor, None]:
        grad_NX = ctx.flat.from_rows(grad_BTX)
        grad_NX[: ctx.flat.shared] += grad_BTX[1:, : ctx.flat.shared].sum(0)
        return grad_NX, None


def forward(
    model: nn.Module,
    head: Head,
    batch: dict[str, Tensor],
    needs: Needs = Needs(),
    prefix: CommonPrefix | None = None,
    layout: Layout = "padded",
    hooks: ExitStack | None = None,
) -> Taps:
    """One forward of `model` on `batch` (input_ids, attention_mask, position_ids), with the results
    that `needs` asks for.

    `prefix` is what all rows begin with, if it is known already: it is not computed again, and the
    rest is padded. Masks of `needs` choose real tokens; hidden states at padding mean nothing. If
    checkpointed layers run again in the backward pass, close `hooks` after it.

    Raises:
        DefenseError: keys were asked for and no attention layer gave them, or they carry no
            gradient although the model trains (the effect of re-entrant checkpointing): a penalty
            on them would silently be zero.
    """
    if prefix is not None or layout == "padded":
        return _padded_forward(model, head, batch, needs, prefix)
    flat = Flat.of(batch, share=layout == "shared")
    with nullcontext(hooks) if hooks is not None else ExitStack() as stack:
        return _flat_forward(model, head, batch, needs, flat, stack)


def compute_prefix(model: nn.Module, ids_P: Tensor, layers: tuple[int, ...] = ()) -> CommonPrefix:
    """One forward of the tokens that rows begin with; the residual stream after `layers` is
    kept."""
    cache = DynamicCache()  # without a config, it keeps tokens outside a sliding window, too
    inputs = {"input_ids": ids_P[None], cache_name(model): cache}
    found = _run(model, inputs, Needs(layers=layers))
    return CommonPrefix(cache, found.hidden, found.layers)


def _padded_forward(
    model: nn.Module,
    head: Head,
    batch: dict[str, Tensor],
    needs: Needs,
    prefix: CommonPrefix | None,
) -> Taps:
    inputs: dict[str, Any] = {
        name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")
    }
    if prefix is not None:
        start = prefix.hidden_1PD.shape[1]
        inputs |= {name: inputs[name][:, start:] for name in ("input_ids", "position_ids")}
        inputs[cache_name(model)] = prefix.cache_of(len(inputs["input_ids"]))
    found = _run(model, inputs, needs)
    if prefix is not None:
        found.hidden = _with_prefix(prefix.hidden_1PD, found.hidden)
        found.layers = {
            number: _with_prefix(prefix.states[number], found.layers[number])
            for number in needs.layers
        }
    places = lambda mask_BT: mask_BT.nonzero(as_tuple=True)  # noqa: E731
    return _taps(causal_lm(model), head, needs, found, places)


def _flat_forward(
    model: nn.Module,
    head: Head,
    batch: dict[str, Tensor],
    needs: Needs,
    flat: Flat,
    hooks: ExitStack,
) -> Taps:
    inner = causal_lm(model)
    inputs: dict[str, Any] = {
        name: flat.from_rows(batch[name])[None] for name in ("input_ids", "position_ids")
    }
    if is_flash_attention_requested(inner.config) and not flat.shared:
        inputs["attention_mask"] = None  # its kernel takes the starts of rows from the positions
    else:
        # Of four dimensions, so that the model makes none.
        inputs["attention_mask"] = flat.at_BT.new_zeros(1, 1, 1, 1)
        hooks.enter_context(around_attention(inner, _by_rows(inner, batch, flat)))
    found = _run(model, inputs, needs)
    found.hidden = flat.to_rows(found.hidden[0])

    def places(mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        at_N = flat.at_BT[mask_BT]
        return torch.zeros_like(at_N), at_N

    return _taps(inner, head, needs, found, places)


def _by_rows(inner: Any, batch: dict[str, Tensor], flat: Flat) -> AroundAttention:
    """Attention over the rows of a batch, from queries, keys and values [1, heads, N, size] of its
    flat tokens."""
    config = inner.config.get_text_config()
    one = torch.empty(1, dtype=inner.dtype, device=flat.at_BT.device)
    shape_only_BT1 = one.expand(*flat.at_BT.shape, 1)
    masks = create_masks_for_generate(  # without a cache, whose name differs between releases
        config, shape_only_BT1, batch["attention_mask"], None, position_ids=batch["position_ids"]
    )

    def attend(
        plain: Any,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> Any:
        mask = masks[config.layer_types[module.layer_idx]] if isinstance(masks, dict) else masks
        inputs = (query, key, value)
        rows = (flat.to_rows(states[0].transpose(0, 1)).transpose(1, 2) for states in inputs)
        found_BTHE, weights = plain(module, *rows, mask, **options)
        return flat.from_rows(found_BTHE)[None], weights

    return attend


@dataclass
class _Found:
    """What a forward gave: final hidden states, residual streams and keys and values by layer."""

    hidden: Tensor
    layers: dict[int, Tensor]
    kv: dict[int, tuple[Tensor, Tensor]]


def _run(model: nn.Module, inputs: dict[str, Any], needs: Needs) -> _Found:
    inner = causal_lm(model)
    with (
        layer_outputs({0: inner.get_decoder()}) as decoder,
        layer_outputs({n: decoder_layers(model)[n - 1] for n in needs.layers}) as layers,
        keys_and_values(inner, needs.kv_BT is not None) as kv,
    ):
        model(**inputs, use_cache=False, **_no_logits(inner, inputs["input_ids"]))
    return _Found(decoder[0], layers, kv)


def _taps(
    inner: Any,
    head: Head,
    needs: Needs,
    found: _Found,
    places: Callable[[Tensor], tuple[Tensor, ...]],
) -> Taps:
    """`places` of a mask [B, T]: the row and place of each of its tokens in the layers, keys and
    values found. Final hidden states are in rows already."""
    taps = Taps(head, found.hidden, needs)
    if needs.kv_BT is not None:
        chosen = places(needs.kv_BT)  # once, because it waits for the device
        taps.kv = [_at(found.kv[index], chosen) for index in sorted(found.kv)]
        _check_kv(taps.kv, inner, found.hidden.requires_grad)
    if needs.states_BT is not None:
        chosen = places(needs.states_BT)
        taps.states = {number: found.layers[number][chosen] for number in needs.layers}
    return taps


def _with_prefix(prefix_1PD: Tensor, rest_BSD: Tensor) -> Tensor:
    """The prefix on every row, followed by the rest, [B, P + S, D]."""
    return torch.cat([prefix_1PD.expand(len(rest_BSD), -1, -1), rest_BSD], 1)


def _no_logits(inner: Any, ids: Tensor) -> dict[str, Tensor]:
    """A forward makes no logits: the losses make those they need, in tiles."""
    wanted = "logits_to_keep" in inspect.signature(inner.forward).parameters
    return {"logits_to_keep": ids.new_zeros(0)} if wanted else {}


def check_layout(model: nn.Module, head: Head, layout: Layout) -> None:
    """Compares two short rows in the layout with each of them alone.

    Raises:
        ModelError: final hidden states differ. Recurrent layers, convolutions or custom attention
            may carry the end of one row into the next.
    """
    if layout == "padded":
        return
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            off, tolerance = _misfit(model, head, layout)
        seen = f"rows would see each other (final hidden states are off by {off:.0%})"
        problem = None if off <= tolerance else seen  # nan is a problem
    except Exception as error:  # of many kinds, in models not made for this
        problem = f"its forward fails on them ({error})"
    finally:
        model.train(was_training)
    if problem:
        raise ModelError(
            f"layout: {layout}: {type(causal_lm(model)).__name__} cannot compute the tokens of a "
            f"batch as one row: {problem}; set train.layout to padded"
        )


def _misfit(model: nn.Module, head: Head, layout: Layout) -> tuple[float, float]:
    """Largest relative error in the second of two rows, and the error that rounding may leave."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 7, 8, 0, 0]], device=causal_lm(model).device)
    real = ids != 0
    batch = {"input_ids": ids, "attention_mask": real.long(), "position_ids": real.cumsum(1) - 1}
    alone = {name: tensor[1:, :4] for name, tensor in batch.items()}
    found_ND = forward(model, head, batch, layout=layout).hidden_BTD[1, :4]
    expected_ND = forward(model, head, alone).hidden_BTD[0]
    off_N = (found_ND - expected_ND).float().norm(dim=-1) / expected_ND.float().norm(dim=-1)
    return float(off_N.max()), 1e-3 if found_ND.dtype == torch.float32 else 0.1


def _check_kv(kv: list[tuple[Tensor, Tensor]], inner: Any, trains: bool) -> None:
    name = type(inner).__name__
    if not kv:
        raise DefenseError(
            f"{name}: no attention layer passed keys and values through transformers' attention "
            "interface"
        )
    if trains and not any(tensor.requires_grad for pair in kv for tensor in pair):
        raise DefenseError(
            f"{name}: keys and values carry no gradient. Either no trained weight comes before "
            "them, or re-entrant activation checkpointing cut them off (use_reentrant=False is "
            "needed)"
        )


def _at(pair: tuple[Tensor, Tensor], chosen: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Keys and values [B, heads, T, size] -> [N, heads * size] at the chosen tokens, given by row
    and place."""
    rows_N, places_N = chosen
    key, value = (states[rows_N, :, places_N].flatten(1) for states in pair)
    return key, value


def prefix_kv(model: nn.Module, prefix_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [P, E] of each layer for a prefix alone ([P] ids); by causality, those of
    every row with it."""
    inner = causal_lm(model)
    ids = prefix_ids[None]
    with torch.no_grad(), keys_and_values(inner, True) as layers:
        model(input_ids=ids, use_cache=False)
    chosen = torch.ones_like(ids).nonzero(as_tuple=True)
    return [_at(layers[index], chosen) for index in sorted(layers)]
