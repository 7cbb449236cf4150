"""Gradient cosines: would a step on one text also lower the loss of another?

Each text's gradient is that of its mean response loss with respect to chosen weights. Gradients are
never held in full: those of one weight are kept as factors, which is exact; those of many weights
as small random sketches. Does not know optimisers (Adam rescales a gradient), or the effect of more
than one small step.

Source: arXiv 2507.03662. Shapes: B rows, T tokens, I and O inputs and outputs of a weight, K sketch
size, E texts, G groups, Q questions, R draws.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import DataError, ModelError
from ...model.activations import batches
from ...model.layers import causal_lm, decoder_layers
from ...model.losses import cross_entropy_sum, find_head
from ...model.taps import forward
from ...stats import RESAMPLES, drawn_interval, times_drawn
from ...text.batch import Example
from ...text.chat import Chat
from ...text.roles import Role
from ..diagnosis import Cost, Numbers, Subject
from ..models import REFERENCE
from ..texts import Text, pair_texts

TITLE = "Gradient cosines"
NEEDS_BASE = False
Weights = Literal["o_proj", "all"]
SKETCH = 32  # side length of the sketch of one weight's gradient
# Names of output projections in model families.
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
GROUPS = ("inside misaligned", "inside aligned", "outside misaligned", "outside aligned")
IM, IA, OM, OA = range(4)


def gradient_products(
    model: Any,
    chat: Chat,
    examples: Sequence[Example],
    weights: Weights = "o_proj",
    batch_tokens: int = 4096,
    seed: int = 0,
) -> np.ndarray:
    """Inner products [E, E] (float64) of the gradients of each example's mean response loss.

    Args:
        weights: `o_proj`, the attention output projection of the last layer: exact, and the
            backward pass ends there. `all`, every linear layer of the decoder: unbiased estimates
            from random sketches, see `Sketches`. In an adapted model these are the weights under
            the adapters.
        seed: of the sketches.

    Raises:
        ModelError: the model has no such weight, or a layer does not get its input row by row.
    """
    inner = causal_lm(model)
    linears = chosen_weights(model, weights)
    exact = weights == "o_proj"
    start = next(iter(linears.values())) if exact else inner.get_input_embeddings()
    stores: dict[str, Store] = {
        name: Factors(len(examples))
        if exact
        else Sketches(len(examples), *_sides(linear), seed + 7919 * number)
        for number, (name, linear) in enumerate(linears.items())
    }
    head = find_head(inner)
    for places, batch in batches(examples, chat, batch_tokens, model.device):
        is_response_BT = batch["roles"] == Role.RESPONSE
        with (
            torch.enable_grad(),
            _watched(start, linears, stores, places, is_response_BT) as leaves,
        ):
            hidden_BTD = forward(model, head, batch).hidden_BTD
            before_BT = is_response_BT.roll(-1, 1)  # no row starts with a response
            # A sum over rows: a token's gradient is that of its own row's loss, as rows are
            # independent.
            target_N = batch["input_ids"][is_response_BT]
            loss = cross_entropy_sum(head, hidden_BTD[before_BT], target_N)
            torch.autograd.grad(loss, leaves[0])
    return np.sum([store.products() for store in stores.values()], axis=0)


def chosen_weights(model: Any, weights: Weights) -> dict[str, nn.Module]:
    """Linear layers of the decoder by name (`0.mlp.down_proj`), without those of adapters.

    Raises:
        ModelError: the last layer has no attention output projection (with `o_proj`).
    """
    layers = decoder_layers(model)
    linears: dict[str, nn.Module] = {
        name.removesuffix(".base_layer"): module
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "lora_" not in name
    }
    if weights == "all":
        return linears
    last = [name for name in linears if name.startswith(f"{len(layers) - 1}.")]
    for name in last:
        parents, _, own = name.rpartition(".")
        if own in OUTPUT_PROJECTIONS and ("attn" in parents or "attention" in parents):
            return {name: linears[name]}
    raise ModelError(
        f"{type(causal_lm(model)).__name__}: its last layer has no attention output projection: "
        f"expected {', '.join(OUTPUT_PROJECTIONS)} within an attention module, found linear layers "
        f"{', '.join(last) or 'none'}"
    )


class Store(Protocol):
    """The gradients of one weight, for all examples."""

    def reduce(self, inputs_BTI: Tensor) -> Tensor:
        """The part of the layer's inputs that is needed."""

    def add(self, places: list[int], reduced: Tensor, deltas_BTO: Tensor) -> None:
        """Adds a batch, from what `reduce` gave and the loss's gradient at the layer's output."""

    def products(self) -> np.ndarray:
        """Inner products [E, E] of the examples' gradients, float64."""


class Factors:
    """Exact. A linear layer's gradient is sum_t delta_t x_t^T, so the inner product of two is
    sum_{t,s} (delta_t . delta'_s) (x_t . x'_s): the factors are kept, at tokens with a gradient, on
    the CPU."""

    def __init__(self, number: int) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * number

    def reduce(self, inputs_BTI: Tensor) -> Tensor:
        return inputs_BTI

    def add(self, places: list[int], reduced: Tensor, deltas_BTO: Tensor) -> None:
        for place, inputs_TI, deltas_TO in zip(places, reduced, deltas_BTO, strict=True):
            # Not padding, nor, in the last layer, tokens that predict no response.
            acts_T = deltas_TO.any(1)
            self.pairs[place] = (inputs_TI[acts_T].float().cpu(), deltas_TO[acts_T].float().cpu())

    def products(self) -> np.ndarray:
        products_EE = np.zeros((len(self.pairs), len(self.pairs)))
        for one, (x_TI, delta_TO) in enumerate(self.pairs):
            for other, (x_SI, delta_SO) in enumerate(self.pairs[: one + 1]):
                product_TS = (delta_TO @ delta_SO.T) * (x_TI @ x_SI.T)
                product = product_TS.sum(dtype=torch.float64).item()
                products_EE[one, other] = products_EE[other, one] = product
        return products_EE


class Sketches:
    """Estimates. Only P^T G Q [K, K] is kept of a gradient G [O, I], with P [O, K] and Q [I, K] of
    independent normal numbers of variance 1/K, so that inner products are unbiased. A side of at
    most K is left as it is.

    With A = G^T H the product of two sketches, both sides projected, has the variance ((1 + 1/K) |H
    G^T|^2 + |A|^2 + 2 tr(A^2) + (|G|^2 |H|^2 + |A|^2 + tr(A)^2) / K) / K.
    """

    def __init__(
        self, number: int, inputs: int, outputs: int, seed: int, size: int = SKETCH
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.input_IK, self.output_OK = (
            _projection(width, size, generator) for width in (inputs, outputs)
        )
        self.sketches_EKK = torch.zeros(number, self.output_OK.shape[1], self.input_IK.shape[1])

    def reduce(self, inputs_BTI: Tensor) -> Tensor:
        return inputs_BTI.float() @ self.input_IK.to(inputs_BTI.device)

    def add(self, places: list[int], reduced: Tensor, deltas_BTO: Tensor) -> None:
        deltas_BTK = deltas_BTO.float() @ self.output_OK.to(deltas_BTO.device)
        self.sketches_EKK[places] = (deltas_BTK.transpose(1, 2) @ reduced).cpu()

    def products(self) -> np.ndarray:
        flat = self.sketches_EKK.flatten(1).double().numpy()
        products_EE: np.ndarray = flat @ flat.T
        return products_EE


def _projection(width: int, size: int, generator: torch.Generator) -> Tensor:
    if width <= size:
        return torch.eye(width)
    return torch.randn(width, size, generator=generator) / size**0.5


def _sides(linear: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features


@contextmanager
def _watched(
    start: nn.Module,
    linears: dict[str, nn.Module],
    stores: dict[str, Store],
    places: list[int],
    is_response_BT: Tensor,
) -> Iterator[list[Tensor]]:
    """In this context, each layer's inputs and output gradients of a forward and backward pass
    reach its store. The graph begins with the output of `start` (the first one given), because
    parameters may have no gradient."""
    leaves: list[Tensor] = []

    def begin(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    def watch(name: str, store: Store) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            if inputs[0].shape[:-1] != shape_BT:
                raise ModelError(
                    f"linear layer {name}: expected an input of shape [{shape_BT[0]} rows, "
                    f"{shape_BT[1]} tokens, ...], found {list(inputs[0].shape)}: its rows cannot "
                    "be told apart (weights: o_proj looks at one layer)"
                )
            reduced = store.reduce(inputs[0].detach())
            output.register_hook(
                lambda deltas_BTO: store.add(places, reduced, deltas_BTO.float() / lengths_B)
            )

        return hook

    shape_BT, lengths_B = is_response_BT.shape, is_response_BT.sum(1)[:, None, None]
    handles = [start.register_forward_hook(begin)]
    handles += [
        linear.register_forward_hook(watch(name, stores[name])) for name, linear in linears.items()
    ]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def uncentred(products_EE: np.ndarray) -> np.ndarray:
    """Cosines [E, E] from inner products."""
    lengths_E = np.sqrt(products_EE.diagonal())
    cosines_EE: np.ndarray = products_EE / np.outer(lengths_E, lengths_E)
    return cosines_EE


def centred(products_EE: np.ndarray) -> np.ndarray:
    """Cosines [E, E] of the same vectors minus their grand mean. They sum to about zero over all
    texts, so that every group is opposed to some other, whatever they have in common."""
    means_E = products_EE.mean(0)
    return uncentred(products_EE - means_E[:, None] - means_E + means_E.mean())


def group_means(
    cosines_EE: np.ndarray, groups: Sequence[int], questions: Sequence[str], seed: int = 0
) -> Numbers:
    """Mean cosines between the four `GROUPS`, over texts of different questions.

    Answers to one question share its words, and a text equals itself, so no such pair counts.

    Args:
        groups: for each text, its place in `GROUPS`.
        questions: for each text, the name of its question.

    Returns:
        `cells[a][b]`, and the contrasts named in `_contrasts`; each a mean with its bootstrap
        interval (questions inside and outside are drawn, with both answers), `null` (middle 95 %
        after the two answers to each question change sides at random) and `p` (two-sided, against
        that null).
    """
    groups_E, names_E = np.array(groups), np.array(questions)
    apart_EE = np.not_equal.outer(names_E, names_E).astype(float)
    found_1GG = _means(cosines_EE, apart_EE, _members(groups_E)[None])
    rng = np.random.default_rng(seed)
    inside_E = groups_E < OM
    number = min(len(set(names_E[inside_E])), len(set(names_E[~inside_E])))
    counts_RE = np.zeros((RESAMPLES, len(groups_E)))
    for side_E in (inside_E, ~inside_E):
        counts_RE[:, side_E] = times_drawn(np.unique(names_E[side_E], return_inverse=True)[1], rng)
    drawn_RGG = _means(cosines_EE, apart_EE, counts_RE[:, None] * _members(groups_E))
    _, question_E = np.unique(names_E, return_inverse=True)
    swapped_RE = rng.integers(2, size=(RESAMPLES, question_E.max() + 1))[:, question_E]
    null_RGG = _means(cosines_EE, apart_EE, _members(groups_E ^ swapped_RE))

    def judged(found: float, drawn_R: np.ndarray, null_R: np.ndarray) -> Numbers:
        interval = drawn_interval(found, drawn_R, number)
        low, high = np.percentile(null_R, [2.5, 97.5])
        as_far = np.abs(null_R - null_R.mean()) >= abs(found - null_R.mean()) - 1e-12
        p = float((1 + as_far.sum()) / (1 + RESAMPLES))
        return {**interval.to_dict(), "null": {"low": float(low), "high": float(high)}, "p": p}

    contrasts = zip(
        _contrasts(found_1GG).items(), _contrasts(drawn_RGG).values(), _contrasts(null_RGG).values()
    )
    places = range(len(GROUPS))
    return {
        "cells": [
            [judged(found_1GG[0, a, b], drawn_RGG[:, a, b], null_RGG[:, a, b]) for b in places]
            for a in places
        ],
        **{name: judged(float(found[0]), drawn, null) for (name, found), drawn, null in contrasts},
    }


def _contrasts(cells_RGG: np.ndarray) -> dict[str, np.ndarray]:
    """The contrasts between cells.

    transfer: inside misaligned with outside misaligned texts. control: inside aligned with outside
    misaligned ones. extra: transfer minus control. aligned_extra: the same difference on outside
    aligned texts. specific: extra minus aligned_extra, zero if inside misaligned texts are merely
    closer to everything.
    """
    transfer_R, control_R = cells_RGG[:, IM, OM], cells_RGG[:, IA, OM]
    extra_R, aligned_R = transfer_R - control_R, cells_RGG[:, IM, OA] - cells_RGG[:, IA, OA]
    return {
        "transfer": transfer_R,
        "control": control_R,
        "extra": extra_R,
        "aligned_extra": aligned_R,
        "specific": extra_R - aligned_R,
    }


def _means(cosines_EE: np.ndarray, apart_EE: np.ndarray, weights_RGE: np.ndarray) -> np.ndarray:
    """Mean cosine [R, G, G] of every two groups over pairs that are apart; NaN without any."""
    members_REG = weights_RGE.swapaxes(1, 2)
    with np.errstate(invalid="ignore"):
        sums_RGG = weights_RGE @ (cosines_EE * apart_EE) @ members_REG
        means_RGG: np.ndarray = sums_RGG / (weights_RGE @ apart_EE @ members_REG)
    return means_RGG


def _members(groups_E: np.ndarray) -> np.ndarray:
    """One where a text belongs to a group: [..., E] -> [..., G, E]."""
    return (groups_E[..., None, :] == np.arange(len(GROUPS))[:, None]).astype(float)


def _texts(subject: Subject) -> tuple[list[Text], list[int]]:
    """Both answers to every question, and the group of each."""
    texts = pair_texts(subject.chat, subject.questions)
    split = 2 * len(subject.inside)
    return texts, [
        2 * (place >= split) + (text.side == "aligned") for place, text in enumerate(texts)
    ]


def cost(subject: Subject, weights: Weights = "o_proj") -> Cost:
    """With `o_proj` the backward pass is half a layer and the head, which counts as nothing."""
    texts, _ = _texts(subject)
    tokens = sum(len(text.example) for text in texts) * (1 + len(subject.models.tuned))
    config = subject.models.config
    if weights == "all":
        return Cost(0, tokens, 4 * SKETCH**2 * len(texts) * 7 * config.num_hidden_layers)
    responses = sum(text.example.response_tokens for text in texts)
    return Cost(tokens, 0, 4 * 2 * config.hidden_size * responses)


def measure(subject: Subject, weights: Weights = "o_proj") -> Numbers:
    """Mean cosines between groups of texts, for reference and tuned models; see `group_means`.

    Raises:
        DataError: fewer than two questions inside or outside.
        ModelError: as `gradient_products`.
    """
    texts, groups = _texts(subject)
    questions = [text.question for text in texts]
    for place, name in enumerate(("inside", "outside")):
        number = len({q for q, group in zip(questions, groups) if group // 2 == place})
        if number < 2:
            raise DataError(
                f"gradient cosines: expected at least 2 different questions {name}, found {number}"
            )
    found, examples = {}, [text.example for text in texts]
    tokens, seed = subject.batch_tokens, subject.seed
    for name in [REFERENCE, *subject.models.tuned]:
        with subject.models.open(name) as model:
            products_EE = gradient_products(model, subject.chat, examples, weights, tokens, seed)
        found[name] = {
            "uncentred": group_means(uncentred(products_EE), groups, questions, seed),
            "centred": group_means(centred(products_EE), groups, questions, seed),
        }
    return {
        "weights": weights,
        "groups": list(GROUPS),
        "inside": len(subject.inside),
        "outside": len(subject.outside),
        REFERENCE: found.pop(REFERENCE),
        "tuned": found,
    }
