"""Cross-entropy, KL and other losses on next-token distributions from final hidden states, in tiles
of tokens.

A [tokens, vocabulary] tensor never exists: each tile's logits are made once for all losses of a
step, the losses and their gradient are taken, and the logits are dropped. A loss gives its
derivative in closed form, so the only tensors of the vocabulary's size that autograd keeps are the
log-probabilities of one tile. Values and gradients equal the naive form. Does not know roles,
defenses or training.

Shapes: N tokens, D hidden size, V vocabulary, K most probable tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from .sharding import gathered, is_sharded

Direction = Literal["reverse", "forward"]
# Logits made at once: 128 MiB in float32. With fewer rows the head's product would be slow.
TILE_ELEMENTS = 2**25
BLOCK_ELEMENTS = 2**22  # compared at once: intermediate results stay in or near the cache


@dataclass(frozen=True)
class Head:
    """Final hidden states to float32 logits, as the model itself computes them:
    `softcap(scale * lm_head(hidden))`."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        # A sharded head is whole after a forward; its hooks would gather it again for each tile,
        # and ranks have different numbers of tiles.
        compute = self.module.forward if is_sharded(self.module) else self.module
        types = {p.dtype for p in self.module.parameters() if p.is_floating_point()}
        # An adapter on the head stays in float32 on a bfloat16 base: all is computed in the base's
        # type.
        with torch.autocast(hidden_ND.device.type, torch.bfloat16, enabled=len(types) > 1):
            logits_NV = compute(hidden_ND).float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return self.softcap * torch.tanh(logits_NV / self.softcap) if self.softcap else logits_NV

    @property
    def vocabulary(self) -> int:
        return int(self.module.weight.shape[0])  # type: ignore[union-attr, index]

    @property
    def trainable(self) -> list[Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]


def find_head(causal_lm: Any) -> Head:
    """The head of a causal language model.

    Raises:
        ModelError: its logits are not what `Head` computes (checked on a few tokens, once per
            model): losses would be silently wrong.
    """
    known = _HEADS.get(causal_lm)
    if known is not None and known.module is causal_lm.get_output_embeddings():
        return known
    config = causal_lm.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale = getattr(config, "logit_scale", None) or 1.0 / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    head = Head(causal_lm.get_output_embeddings(), float(scale), softcap)
    ids = torch.arange(1, 9, device=causal_lm.device)[None]
    was_training = causal_lm.training
    causal_lm.eval()
    with torch.no_grad():
        output = causal_lm(ids, output_hidden_states=True, use_cache=False)
        ours = head(output.hidden_states[-1])
    causal_lm.train(was_training)
    error = (ours - output.logits.float()).abs().max().item()
    if error > 1e-2 * output.logits.abs().max().item() + 1e-6:
        raise ModelError(
            f"{type(causal_lm).__name__}: its logits are not its head on its last hidden state "
            f"(off by {error:.3g})"
        )
    _HEADS[causal_lm] = head
    return head


_HEADS: "WeakKeyDictionary[nn.Module, Head]" = WeakKeyDictionary()


class LogitLoss(ABC):
    """A loss on the student's next-token distributions: a sum over the N tokens of `mask`, row by
    row.

    `mask` has the shape of the hidden states without D: true where the loss uses a token's
    distribution.
    """

    mask: Tensor

    @abstractmethod
    def at(
        self, places_N: Tensor, logp_NV: Tensor, slope_NV: Tensor | None, weight: float
    ) -> Tensor:
        """Sum of the loss over some of its tokens (a scalar), without autograd.

        Args:
            places_N: numbers of these tokens among the loss's own, from 0.
            logp_NV: the student's log-probabilities there. Other losses read them, too, so they
                must not be changed.
            slope_NV: `weight` times the derivative in each log-probability is added to it, as if
                log-probabilities were independent: `weighted_sum` continues to the logits from
                there. None if no gradient is wanted.
        """


@dataclass(frozen=True)
class CrossEntropy(LogitLoss):
    """-log p(target)."""

    mask: Tensor
    target_N: Tensor

    def at(
        self, places_N: Tensor, logp_NV: Tensor, slope_NV: Tensor | None, weight: float
    ) -> Tensor:
        target_N1 = self.target_N[places_N, None]
        if slope_NV is not None:
            slope_NV.scatter_add_(1, target_N1, slope_NV.new_full(target_N1.shape, -weight))
        return -logp_NV.gather(1, target_N1).sum()


@dataclass(frozen=True)
class States:
    """A reference, given by its final hidden states [N, D] and its head."""

    head: Head
    hidden_ND: Tensor


@dataclass(frozen=True)
class TopK:
    """The K most probable next tokens at N places, ids [N, K] and natural log-probabilities [N, K]
    (float32), the most probable first. All other tokens together form one more bucket, the tail."""

    token_ids_NK: Tensor
    logprobs_NK: Tensor

    def __len__(self) -> int:
        return len(self.token_ids_NK)

    def __getitem__(self, places: Tensor) -> "TopK":
        """At some of the places, by a mask [N] or indices."""
        return TopK(self.token_ids_NK[places], self.logprobs_NK[places])


@dataclass(frozen=True)
class Divergence(LogitLoss):
    """KL divergence from or to a reference at the same N tokens, in nats.

    With a `TopK` reference, K + 1 buckets are compared: the result is never negative, and never
    above the KL of the whole distributions.

    Attributes:
        direction: `reverse` = KL(student || reference), `forward` = KL(reference || student).
    """

    mask: Tensor
    reference: States | TopK
    direction: Direction = "reverse"

    def at(
        self, places_N: Tensor, logp_NV: Tensor, slope_NV: Tensor | None, weight: float
    ) -> Tensor:
        if isinstance(self.reference, TopK):
            return self._at_top_k(self.reference[places_N], logp_NV, slope_NV, weight)
        logits_NV = self.reference.head(self.reference.hidden_ND[places_N])
        total = logp_NV.new_zeros(())
        for rows in range(0, len(logp_NV), size := _rows_of(BLOCK_ELEMENTS, self.reference.head)):
            block = slice(rows, rows + size)
            logq_NV = logits_NV[block].log_softmax(-1)
            value, ours_NV = _divergence(logp_NV[block], logq_NV, self.direction)
            total += value
            if slope_NV is not None:
                slope_NV[block].add_(ours_NV, alpha=weight)
        return total

    def _at_top_k(
        self, top: TopK, logp_NV: Tensor, slope_NV: Tensor | None, weight: float
    ) -> Tensor:
        ids_NK, logq_NK = top.token_ids_NK.long(), top.logprobs_NK.float()
        if ids_NK.shape[1] == logp_NV.shape[1]:
            total, ours_NK = _divergence(logp_NV.gather(1, ids_NK), logq_NK.clone(), self.direction)
            if slope_NV is not None:
                slope_NV.scatter_add_(1, ids_NK, weight * ours_NK)
            return total
        # The student's tail is summed, not taken as 1 - top: for a confident student that would be
        # rounding error.
        tail_NV = logp_NV.exp().scatter_(1, ids_NK, 0.0)
        tail_N1 = tail_NV.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        buckets_logp = torch.cat([logp_NV.gather(1, ids_NK), tail_N1.log()], dim=-1)
        buckets_logq = torch.cat([logq_NK, _log_tail(logq_NK)], dim=-1)
        total, ours = _divergence(buckets_logp, buckets_logq, self.direction)
        if slope_NV is not None:
            slope_NV.scatter_add_(1, ids_NK, weight * ours[:, :-1])
            slope_NV.addcmul_(tail_NV, ours[:, -1:] / tail_N1, value=weight)
        return total


def _divergence(logp: Tensor, logq: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """Sum of the KL divergences of rows of log-probabilities, and its derivative in `logp`, up to a
    multiple of p (which normalisation cancels). Overwrites `logq`."""
    if direction == "reverse":
        slope = logp.exp().mul_(torch.sub(logp, logq, out=logq))
        return slope.sum(), slope
    q = logq.exp()
    return logq.sub_(logp).mul_(q).sum(), q.neg_()


def _log_tail(logq_NK: Tensor) -> Tensor:
    """log(1 - sum of q), [N, 1]; float32 log-probabilities cannot tell a tail smaller than their
    precision from none."""
    rest_N1 = 1 - logq_NK.double().exp().sum(-1, keepdim=True)
    return rest_N1.clamp(min=torch.finfo(torch.float32).eps).log().float()


def weighted_sum(
    head: Head, hidden: Tensor, losses: Sequence[tuple[float, LogitLoss]]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All losses in one pass: the student's logits are made once, wherever any loss needs them.

    Args:
        hidden: the student's final hidden states, [..., D].
        losses: pairs of weight and loss.

    Returns:
        The sum of weight * loss, with gradient in the hidden states and the head; and each loss
            without its weight or gradient.
    """
    inputs = (hidden.flatten(0, -2), *head.trainable)
    want_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    total, values = _WeightedSum.apply(head, losses, want_grad, *inputs)
    return total, values.unbind()


def cross_entropy_sum(head: Head, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """Sum over tokens of -log p(target)."""
    everywhere_N = torch.ones_like(target_N, dtype=torch.bool)
    return weighted_sum(head, hidden_ND, [(1.0, CrossEntropy(everywhere_N, target_N))])[0]


def kl_sum(
    student_head: Head,
    student_ND: Tensor,
    reference_head: Head,
    reference_ND: Tensor,
    direction: Direction = "reverse",
) -> Tensor:
    """Sum over tokens of the KL divergence of next-token distributions, in nats; see
    `Divergence`."""
    everywhere_N = torch.ones(len(student_ND), dtype=torch.bool, device=student_ND.device)
    loss = Divergence(everywhere_N, States(reference_head, reference_ND), direction)
    with gathered(student_head.module.parameters()):
        return weighted_sum(student_head, student_ND, [(1.0, loss)])[0]


def relative_drift(now_ND: Tensor, then_ND: Tensor) -> Tensor:
    """||now - then||^2 / ||then||^2 of each token, [N], float32. What was zero and still is (such
    as all that a model makes from a padding token's embedding) has not drifted."""
    then = then_ND.float()
    size_N = then.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (now_ND.float() - then).square().sum(-1) / size_N


def token_logprobs(head: Head, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """log p(target) of each token, [N], without gradient."""
    with torch.no_grad(), gathered(head.module.parameters()):
        size = _rows_of(TILE_ELEMENTS, head)
        tiles = [
            _at_targets(head(hidden), target, _rows_of(BLOCK_ELEMENTS, head))
            for hidden, target in zip(hidden_ND.split(size), target_N.split(size))
        ]
    return torch.cat(tiles) if tiles else hidden_ND.new_zeros(0, dtype=torch.float32)


def _at_targets(logits_NV: Tensor, target_N: Tensor, size: int) -> Tensor:
    """Log-probabilities, in blocks of `size` tokens."""
    blocks = zip(logits_NV.split(size), target_N.split(size))
    return torch.cat(
        [-F.cross_entropy(logits, target, reduction="none") for logits, target in blocks]
    )


def top_k(head: Head, hidden_ND: Tensor, k: int) -> TopK:
    """The `k` most probable next tokens and their log-probabilities, without gradient (k <= V)."""
    ids = [torch.empty(0, k, dtype=torch.long, device=hidden_ND.device)]
    logprobs = [torch.empty(0, k, device=hidden_ND.device)]
    with torch.no_grad():
        for hidden in hidden_ND.split(_rows_of(TILE_ELEMENTS, head)) if len(hidden_ND) else ():
            largest_NK, ids_NK = head(hidden).log_softmax(-1).topk(k)
            ids.append(ids_NK)
            logprobs.append(largest_NK)
    return TopK(torch.cat(ids), torch.cat(logprobs))


def _rows_of(elements: int, head: Head) -> int:
    return max(1, elements // head.vocabulary)


def _tiles(
    losses: Sequence[tuple[float, LogitLoss]], size: int
) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """At most `size` tokens at a time, all needed by the same losses: their places among all tokens
    and, for each loss, among its own."""
    masks_LN = torch.stack([loss.mask.flatten() for _, loss in losses])
    own_LN = masks_LN.cumsum(1) - 1
    bits_L1 = 2 ** torch.arange(len(losses), device=masks_LN.device)[:, None]
    looking_N = (masks_LN * bits_L1).sum(0)
    for code in looking_N.unique().tolist():
        which = [index for index in range(len(losses)) if code >> index & 1]
        for places_N in (looking_N == code).nonzero()[:, 0].split(size) if which else ():
            yield places_N, {index: own_LN[index, places_N] for index in which}


def _take_tile(
    head: Head,
    losses: Sequence[tuple[float, LogitLoss]],
    own: dict[int, Tensor],
    tile_ND: Tensor,
    parameters: tuple[Tensor, ...],
    values_L: Tensor,
    slope_NV: Tensor | None,
) -> list[Tensor]:
    """Adds the losses of a tile to `values_L`. Returns the gradients of their weighted sum in the
    tile and the parameters, if there is a `slope_NV` to make them in. Whatever is as large as the
    logits is dropped at the end."""
    with torch.set_grad_enabled(slope_NV is not None):
        logits_NV = head(tile_ND)
    logp_NV = logits_NV.detach()  # in the logits' place: a head's gradient does not need its output
    size = _rows_of(BLOCK_ELEMENTS, head)
    for block in logp_NV.split(size):
        block.copy_(block.log_softmax(-1))
    if slope_NV is not None:
        slope_NV = slope_NV[: len(logp_NV)].zero_()
    for index, own_N in own.items():
        weight, loss = losses[index]
        values_L[index] += loss.at(own_N, logp_NV, slope_NV, weight)
    if slope_NV is None:
        return []
    for logp, slope in zip(logp_NV.split(size), slope_NV.split(size)):
        slope.addcmul_(logp.exp(), slope.sum(-1, keepdim=True), value=-1)  # through log_softmax
    return list(torch.autograd.grad(logits_NV, (tile_ND, *parameters), slope_NV))


class _WeightedSum(torch.autograd.Function):
    """Takes each tile's gradient in the forward pass, so that no tile's logits outlive it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, head: Head, losses: Any, want_grad: bool, hidden_ND: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        values_L = torch.zeros(len(losses), dtype=torch.float32, device=hidden_ND.device)
        hidden_grad_ND = torch.zeros_like(hidden_ND) if want_grad else None
        grads = [torch.zeros_like(p, dtype=torch.float32) for p in parameters] if want_grad else []
        size = _rows_of(TILE_ELEMENTS, head)
        # One for all tiles: allocating so much new memory is slow.
        shape = (min(size, len(hidden_ND)), head.vocabulary)
        slope_NV = torch.empty(shape, device=hidden_ND.device) if want_grad else None
        for places_N, own in _tiles(losses, size):
            tile_ND = hidden_ND[places_N].requires_grad_(want_grad)
            tile_grads = _take_tile(head, losses, own, tile_ND, parameters, values_L, slope_NV)
            if hidden_grad_ND is not None:
                hidden_grad_ND[places_N], *tile_grads = tile_grads
                for grad, tile_grad in zip(grads, tile_grads):
                    grad += tile_grad
        ctx.save_for_backward(hidden_grad_ND, *grads)
        ctx.parameter_types = [p.dtype for p in parameters]
        ctx.mark_non_differentiable(values_L)
        weights_L = torch.tensor([weight for weight, _ in losses], device=values_L.device)
        return (weights_L * values_L).sum(), values_L

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Any) -> Any:  # type: ignore[override]
        hidden_grad_ND, *grads = ctx.saved_tensors
        scaled = [(grad * grad_total).to(dtype) for grad, dtype in zip(grads, ctx.parameter_types)]
        return None, None, None, (hidden_grad_ND * grad_total).to(hidden_grad_ND.dtype), *scaled
