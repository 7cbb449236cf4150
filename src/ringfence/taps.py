"""What a forward pass may be asked for: the final hidden states, the residual stream after chosen layers, and the true
keys and values, at chosen tokens; and what may be put in their place.

One forward serves all that ask. Keys and values are taken where the attention function receives them: after the
layer's input norm, the projection with its adapters, any key norm and the rotary embedding; that is what the model's
own cache holds. Works under (non-re-entrant) activation checkpointing, where the cache itself is off. Does not know
defenses.

A batch is padded; how it is computed is a *layout*, and what a forward gives is the same in each:
padded: as it is. packed: all rows one after another in one row, without padding; transformers sees from position ids
that restart that rows are not to see each other. shared: the tokens that all rows begin with are computed once, as one
row, with gradient; attention of the rest reads their keys and values.

Shapes: B rows, T tokens, D hidden size, N chosen tokens (row by row), E = key heads x head size.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import DefenseError, ModelError
from .losses import Head, TopK

Layout = Literal["padded", "packed", "shared"]
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


@dataclass(frozen=True)
class CommonPrefix:
    """The P tokens that all rows of a batch begin with, computed as one row.

    Attributes:
        cache: their keys and values, as transformers keeps them.
        hidden_1PD: final hidden states.
        states: residual stream [1, P, D] after the layers that were asked for.
    """

    cache: DynamicCache
    hidden_1PD: Tensor
    states: dict[int, Tensor]

    def cache_of(self, rows: int) -> DynamicCache:
        """A cache for so many rows, which may grow. Gradients of the rows add up in the one row."""
        wide = copy.copy(self.cache)
        layers: list[Any] = [copy.copy(layer) for layer in self.cache.layers]
        for layer in layers:
            layer.keys, layer.values = (states.expand(rows, -1, -1, -1) for states in (layer.keys, layer.values))
        wide.layers = layers
        return wide


def forward(
    model: nn.Module,
    head: Head,
    batch: dict[str, Tensor],
    needs: Needs = Needs(),
    prefix: CommonPrefix | None = None,
    layout: Layout = "padded",
) -> Taps:
    """One forward of `model` on `batch` (input_ids, attention_mask, position_ids), with what was asked.

    `prefix` is what all rows begin with, where it is known already: it is not computed again. In the packed layout
    hidden states are zero at padding, and masks of `needs` choose real tokens.

    Raises:
        DefenseError: keys were asked for and no attention layer gave them, or they carry no gradient although the
            model trains (re-entrant checkpointing does that): a penalty on them would silently be zero.
    """
    if layout == "packed":
        return _packed_forward(model, head, batch, needs)
    if layout == "shared" and prefix is None:
        length = common_length(batch)
        # The plain model: a DDP wrapper wants one forward for each backward.
        plain = getattr(model, "module", model)
        prefix = compute_prefix(plain, batch["input_ids"][0, :length], needs.layers) if length else None
    return _forward(model, head, batch, needs, prefix)


def common_length(batch: dict[str, Tensor]) -> int:
    """Number of tokens that all rows begin with, less than the shortest row has; 0 where there is but one row, or rows
    are padded on the left."""
    ids_BT, real_BT = batch["input_ids"], batch["attention_mask"].bool()
    if len(ids_BT) < 2 or not real_BT[:, 0].all():
        return 0
    common = (ids_BT == ids_BT[0]).all(0).int().cumprod(0).sum()
    return int(torch.minimum(common, real_BT.sum(1).min() - 1))


def compute_prefix(model: nn.Module, ids_P: Tensor, layers: tuple[int, ...] = ()) -> CommonPrefix:
    """One forward of tokens that rows begin with; `layers` are those whose residual stream is kept."""
    inner, ids = causal_lm(model), ids_P[None]
    cache = DynamicCache()  # made without a config, it keeps every token, those outside a sliding window too
    with (
        _outputs({0: inner.get_decoder()}) as decoder,
        _outputs({number: decoder_layers(model)[number - 1] for number in layers}) as states,
    ):
        model(input_ids=ids, past_key_values=cache, use_cache=False, **_no_logits(inner, ids))
    return CommonPrefix(cache, decoder[0], states)


def _packed_forward(model: nn.Module, head: Head, batch: dict[str, Tensor], needs: Needs) -> Taps:
    real_BT = batch["attention_mask"].bool()
    hidden, kv, states = (
        None if mask is None else mask[real_BT][None] for mask in (needs.hidden_BT, needs.kv_BT, needs.states_BT)
    )
    # Without an attention mask transformers looks where positions restart, and masks row from row.
    packed: dict[str, Any] = {name: batch[name][real_BT][None] for name in ("input_ids", "position_ids")}
    taps = _forward(model, head, packed | {"attention_mask": None}, Needs(hidden, kv, states, needs.layers), None)
    hidden_BTD = taps.hidden_BTD.new_zeros(*real_BT.shape, taps.hidden_BTD.shape[-1])
    hidden_BTD[real_BT] = taps.hidden_BTD[0]
    return Taps(head, hidden_BTD, needs, taps.kv, taps.states)


def _forward(model: nn.Module, head: Head, batch: dict[str, Any], needs: Needs, prefix: CommonPrefix | None) -> Taps:
    inner = causal_lm(model)
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    if prefix is not None:
        start = prefix.hidden_1PD.shape[1]
        inputs |= {name: inputs[name][:, start:] for name in ("input_ids", "position_ids")}
        inputs["past_key_values"] = prefix.cache_of(len(inputs["input_ids"]))
    with (
        _outputs({0: inner.get_decoder()}) as decoder,
        _outputs({number: decoder_layers(model)[number - 1] for number in needs.layers}) as layers,
        _keys_and_values(inner, needs.kv_BT is not None) as found,
    ):
        model(**inputs, use_cache=False, **_no_logits(inner, inputs["input_ids"]))
    if prefix is not None:
        decoder = {0: _behind(prefix.hidden_1PD, decoder[0])}
        layers = {number: _behind(prefix.states[number], layers[number]) for number in needs.layers}
    taps = Taps(head, decoder[0], needs)
    if needs.kv_BT is not None:
        chosen = needs.kv_BT.nonzero(as_tuple=True)  # once: a device must be waited for
        taps.kv = [_at(found[index], chosen) for index in sorted(found)]
        _check_kv(taps.kv, inner, taps.hidden_BTD.requires_grad)
    if needs.states_BT is not None:
        chosen = needs.states_BT.nonzero(as_tuple=True)
        taps.states = {number: layers[number][chosen] for number in needs.layers}
    return taps


def _behind(prefix_1PD: Tensor, rest_BSD: Tensor) -> Tensor:
    """The prefix on every row, and the rest behind it, [B, P + S, D]."""
    return torch.cat([prefix_1PD.expand(len(rest_BSD), -1, -1), rest_BSD], 1)


def _no_logits(inner: Any, ids: Tensor) -> dict[str, Tensor]:
    """No logits come from a forward: the losses make those they need, in tiles."""
    wanted = "logits_to_keep" in inspect.signature(inner.forward).parameters
    return {"logits_to_keep": ids.new_zeros(0)} if wanted else {}


def check_layout(model: nn.Module, head: Head, layout: Layout) -> None:
    """Two short rows in the layout against each alone.

    Raises:
        ModelError: final hidden states differ. Recurrent layers, convolutions or custom attention may take the end of
            one row for the beginning of the next, or not go on from a prefix.
    """
    if layout == "padded":
        return
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            off, tolerance = _misfit(model, head, layout)
        problem = None if off <= tolerance else f"final hidden states are off by {off:.0%}"  # nan is a problem
    except Exception as error:  # of many kinds, in models that were not made for this
        problem = str(error)
    finally:
        model.train(was_training)
    if problem:
        field = {"packed": "train.packing", "shared": "train.share_prefix"}[layout]
        why = "would see each other" if layout == "packed" else "do not go on from a prefix that is computed once"
        raise ModelError(f"{field}: rows of {type(causal_lm(model)).__name__} {why} ({problem}); leave {field} out")


def _misfit(model: nn.Module, head: Head, layout: Layout) -> tuple[float, float]:
    """Largest relative error in the second of two rows, and what rounding may leave."""
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


def _at(pair: tuple[Tensor, Tensor], chosen: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Keys and values [B, heads, T, size] -> [N, heads * size] at the chosen tokens, given by row and place."""
    rows_N, places_N = chosen
    key, value = (states[rows_N, :, places_N].flatten(1) for states in pair)
    return key, value


def prefix_kv(model: nn.Module, prefix_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [P, E] of each layer for a prefix alone ([P] ids); by causality those of every row with it."""
    inner = causal_lm(model)
    ids = prefix_ids[None]
    with torch.no_grad(), _keys_and_values(inner, True) as layers:
        model(input_ids=ids, use_cache=False)
    chosen = torch.ones_like(ids).nonzero(as_tuple=True)
    return [_at(layers[index], chosen) for index in sorted(layers)]
