"""Penalties through the contract of a defense, gradients by name, and whether tensors agree."""

from typing import Any

import torch
from torch import Tensor

from ringfence.defenses import Defense
from ringfence.model.layers import causal_lm
from ringfence.model.losses import find_head, weighted_sum
from ringfence.model.taps import Taps, forward
from ringfence.training.reference import Reference


def penalty_of(
    defense: Defense, model: Any, batch: dict[str, Tensor], reference: Reference
) -> Tensor:
    """The mean penalty of one batch, through the contract of a defense."""
    needs = defense.needs(batch)
    student = forward(model, find_head(causal_lm(model)), batch, needs)
    return total_of(defense, student, reference.taps(batch, needs), batch) / defense.count(batch)


def total_of(defense: Defense, student: Taps, reference: Taps, batch: dict[str, Tensor]) -> Tensor:
    """The sum over the penalty's tokens, whichever way the defense gives it."""
    logit_loss = defense.logit_loss(batch, reference)
    if logit_loss is None:
        return defense.penalty(student, reference, batch)
    return weighted_sum(student.head, student.hidden_BTD, [(1.0, logit_loss)])[0]


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    """Gradient of each trainable parameter; zeros where there is none."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads)
    }


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Tensors agree by name, within `tolerance` of the largest entry of all."""
    assert found.keys() == expected.keys()
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    assert scale > 0
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name],
            tensor,
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )
