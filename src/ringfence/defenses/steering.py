"""Preventive steering: the direction of an unwanted trait is added during training, so that the
weights need not move there, and removed afterwards (arXiv 2507.21509, 2508.06249)."""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from ..errors import DefenseError
from ..util.strict_yaml import Real
from .base import Setup
from .stream_edit import StreamEdit, StreamEditConfig


class Steering(StreamEditConfig):
    """In training, h <- h + coefficient * e after the chosen layers, with e a trait's direction.

    Without `layers`, only the middle layer is steered, because the published setting steers one:
    earlier, the stream has little of a trait yet; later, few layers are left to respond to the
    push.
    """

    coefficient: Real = Field(
        5.0, ge=-1e6, le=1e6, description="how far along the direction (published: 5.0, raw)"
    )
    units: Literal["raw", "norm"] = Field(
        "raw",
        description="raw = the vector at its own length; norm = shares of the layer's mean "
        "activation norm",
    )

    def build(self, setup: Setup) -> "SteeringDefense":
        return SteeringDefense(self)


class SteeringDefense(StreamEdit):
    name = "steering"

    def __init__(self, config: Steering) -> None:
        super().__init__(config)
        if config.layers is None:
            self.layers = [(self.directions.layers + 1) // 2]
        number = self.directions.directions_LKD.shape[1]
        if number != 1:
            raise DefenseError(
                f"defenses.steering.vectors: expected one direction a layer, {config.vectors} has "
                f"{number}"
            )
        self.push_D = {layer: self._push(layer, config) for layer in self.layers}

    def _push(self, layer: int, config: Steering) -> Tensor:
        direction_D = self.directions.directions_LKD[layer - 1, 0]
        if config.units == "norm":
            direction_D = direction_D / direction_D.norm() * self.directions.norms_L[layer - 1]
        return config.coefficient * direction_D

    def edit(self, hidden_BTD: Tensor, layer: int) -> Tensor:
        return hidden_BTD + self.push_D[layer].to(hidden_BTD.device)

    def record(self) -> dict[str, Any]:
        """Length of the push in shares of the layer's mean activation norm."""
        norms_L = self.directions.norms_L
        shares = {
            str(layer): float(push_D.norm() / norms_L[layer - 1])
            for layer, push_D in self.push_D.items()
        }
        return {
            "trait": self.directions.trait,
            "push": {layer: round(share, 4) for layer, share in shares.items()},
        }
