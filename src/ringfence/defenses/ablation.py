"""Concept ablation fine-tuning: the span of unwanted directions is projected out of the residual
stream during training, so that nothing is learnt through it (CAFT, arXiv 2507.16795)."""

from typing import Any

from torch import Tensor

from .base import Setup
from .stream_edit import StreamEdit, StreamEditConfig


class Ablation(StreamEditConfig):
    """In training, h <- h - Q Q^T h after chosen layers (default: all); Q spans the directions."""

    def build(self, setup: Setup) -> "AblationDefense":
        return AblationDefense(self)


class AblationDefense(StreamEdit):
    name = "ablation"

    def __init__(self, config: Ablation) -> None:
        super().__init__(config)
        self.basis_DR = {layer: self.directions.basis(layer) for layer in self.layers}

    def edit(self, hidden_BTD: Tensor, layer: int) -> Tensor:
        basis_DR = self.basis_DR[layer].to(hidden_BTD.device)
        return hidden_BTD - hidden_BTD @ basis_DR @ basis_DR.T

    def record(self) -> dict[str, Any]:
        ranks = {str(layer): basis_DR.shape[1] for layer, basis_DR in self.basis_DR.items()}
        return {"trait": self.directions.trait, "directions": ranks}
