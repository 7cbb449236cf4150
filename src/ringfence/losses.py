"""Cross-entropy and KL from final hidden states, in tiles of tokens.

A [tokens, vocabulary] tensor never exists: each tile's logits are made, its loss and gradient taken, and the logits
dropped. Values and gradients equal the naive form. Does not know roles, defenses or training.

Shapes: N tokens, D hidden size, V vocabulary, K most probable tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ModelError

Direction = Literal["reverse", "forward"]
TILE_ELEMENTS = 2**24  # logits alive at once: 64 MiB in float32


@dataclass(frozen=True)
class Head:
    """Final hidden states to float32 logits, as the model itself does it: `softcap(scale * lm_head(hidden))`."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        logits_NV = self.module(hidden_ND).float()
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
        ModelError: its logits are not what `Head` computes (checked on a few tokens, once for a model): losses would
            be silently wrong.
    """
    known = _HEADS.get(causal_lm)
    if known is not None and known.module is causal_lm.get_output_embeddings():
        return known
    config = causal_lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    head = Head(causal_lm.get_output_embeddings(), float(scale), getattr(config, "final_logit_softcapping", None))
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
            f"{type(causal_lm).__name__}: its logits are not its head on its last hidden state (off by {error:.3g})"
        )
    _HEADS[causal_lm] = head
    return head


_HEADS: "WeakKeyDictionary[nn.Module, Head]" = WeakKeyDictionary()


def cross_entropy_sum(head: Head, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """Sum over tokens of -log p(target)."""

    def tile(hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden), target, reduction="sum")

    return _sum_over_tiles(tile, head, (hidden_ND, target_N))


def kl_sum(
    student_head: Head,
    student_ND: Tensor,
    reference_head: Head,
    reference_ND: Tensor,
    direction: Direction = "reverse",
) -> Tensor:
    """Sum over tokens of the KL divergence of next-token distributions, in nats.

    Args:
        direction: `reverse` = KL(student || reference), `forward` = KL(reference || student).
    """

    def tile(student: Tensor, reference: Tensor) -> Tensor:
        log_p = F.log_softmax(student_head(student), dim=-1)
        with torch.no_grad():
            log_q = F.log_softmax(reference_head(reference), dim=-1)
        inner, outer = (log_q, log_p) if direction == "reverse" else (log_p, log_q)
        return F.kl_div(inner, outer, reduction="sum", log_target=True)

    return _sum_over_tiles(tile, student_head, (student_ND, reference_ND.detach()))


def token_logprobs(head: Head, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """log p(target) of each token, [N], without gradient."""
    size = _tile_size(head)
    with torch.no_grad():
        tiles = [
            -F.cross_entropy(head(hidden), target, reduction="none")
            for hidden, target in zip(hidden_ND.split(size), target_N.split(size))
        ]
    return torch.cat(tiles) if tiles else hidden_ND.new_zeros(0, dtype=torch.float32)


@dataclass(frozen=True)
class TopK:
    """The K most probable next tokens at N places, ids [N, K] and natural log-probabilities [N, K] (float32), the most
    probable first. All other tokens together are one more bucket, the tail."""

    token_ids_NK: Tensor
    logprobs_NK: Tensor

    def __len__(self) -> int:
        return len(self.token_ids_NK)

    def __getitem__(self, places: Tensor) -> "TopK":
        """At some of the places, by a mask [N] or indices."""
        return TopK(self.token_ids_NK[places], self.logprobs_NK[places])


def top_k(head: Head, hidden_ND: Tensor, k: int) -> TopK:
    """The `k` most probable next tokens and their log-probabilities, without gradient (k <= V)."""
    ids = [torch.empty(0, k, dtype=torch.long, device=hidden_ND.device)]
    logprobs = [torch.empty(0, k, device=hidden_ND.device)]
    with torch.no_grad():
        for hidden in hidden_ND.split(_tile_size(head)) if len(hidden_ND) else ():
            logits_NV = head(hidden)
            largest_NK, ids_NK = logits_NV.topk(k)
            ids.append(ids_NK)
            logprobs.append(largest_NK - logits_NV.logsumexp(-1, keepdim=True))
    return TopK(torch.cat(ids), torch.cat(logprobs))


def _tile_size(head: Head) -> int:
    return max(1, TILE_ELEMENTS // head.vocabulary)


def _sum_over_tiles(tile: Callable[..., Tensor], head: Head, inputs: tuple[Tensor, ...]) -> Tensor:
    """Sum of `tile(*slices)` over slices of the inputs; gradients reach the first input and the head's parameters."""
    return _TiledSum.apply(tile, _tile_size(head), torch.is_grad_enabled(), len(inputs), *inputs, *head.trainable)


class _TiledSum(torch.autograd.Function):
    """Takes each tile's gradient in the forward pass, so that no tile's logits outlive it."""

    @staticmethod
    def forward(ctx: Any, tile: Any, size: int, want_grad: bool, n_inputs: int, *tensors: Tensor) -> Tensor:
        inputs, parameters = tensors[:n_inputs], tensors[n_inputs:]
        total = torch.zeros((), dtype=torch.float32, device=inputs[0].device)
        hidden_grads, parameter_grads = [], [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for slices in zip(*(t.split(size) for t in inputs)):
            if not want_grad:
                total += tile(*slices)
                continue
            with torch.enable_grad():
                hidden = slices[0].detach().requires_grad_()
                value = tile(hidden, *slices[1:])
                hidden_grad, *grads = torch.autograd.grad(value, (hidden, *parameters))
            total += value.detach()
            hidden_grads.append(hidden_grad)
            for sum_, grad in zip(parameter_grads, grads):
                sum_ += grad
        if want_grad:
            hidden_grad = torch.cat(hidden_grads) if hidden_grads else torch.zeros_like(inputs[0])
            ctx.save_for_backward(hidden_grad, *parameter_grads)
            ctx.parameter_types = [p.dtype for p in parameters]
            ctx.n_inputs = n_inputs
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        hidden_grad, *parameter_grads = ctx.saved_tensors
        others = [None] * (ctx.n_inputs - 1)
        scaled = [(grad * grad_output).to(dtype) for grad, dtype in zip(parameter_grads, ctx.parameter_types)]
        return None, None, None, None, (hidden_grad * grad_output).to(hidden_grad.dtype), *others, *scaled
