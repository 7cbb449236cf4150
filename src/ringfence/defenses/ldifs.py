"""LDIFS: features stay near the reference's (arXiv 2308.13320; as a defense: 2508.06249)."""

from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import DefenseError
from ..model.layers import decoder_layers
from ..model.losses import relative_drift
from ..model.taps import Needs, Taps
from ..text.batch import Batch
from ..text.roles import Role
from ..util.strict_yaml import Layer, Whole
from .base import Penalty, PenaltyConfig, Setup


class LDIFS(PenaltyConfig):
    """weight * mean over tokens of the sum over layers of |h - h0|^2 / |h0|^2.

    h is the residual stream after a layer. The tokens are all those of the user's rows, including
    the template's.
    """

    runs_reference = True

    layers: Layer | tuple[Layer, ...] = Field(
        5,
        description="number of layers, evenly spaced from first to last; or a list of layers, from "
        "1",
    )
    stride: Whole | None = Field(
        None, ge=1, le=10**4, description="instead of layers: every k-th layer"
    )

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.stride is not None and self.layers != type(self).model_fields["layers"].default:
            raise ValueError(
                f"set layers or stride, not both (found layers {self.layers}, stride {self.stride})"
            )
        chosen = (self.layers,) if isinstance(self.layers, int) else self.layers
        if not chosen or min(chosen) < 1 or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"layers: expected a number from 1, or distinct layers from 1, found {self.layers}"
            )
        return self

    def build(self, setup: Setup) -> "LDIFSDefense":
        return LDIFSDefense(self)


class LDIFSDefense(Penalty):
    name = "ldifs"

    def __init__(self, config: LDIFS) -> None:
        super().__init__(config)
        self.config = config
        self.layers: tuple[int, ...] = ()

    def start(self, model: Any) -> None:
        self.layers = chosen_layers(self.config, len(decoder_layers(model)))

    def needs(self, batch: Batch) -> Needs:
        return Needs(states_BT=self._mask(batch), layers=self.layers)

    def count(self, batch: Batch) -> int:
        return int(self._mask(batch).sum())

    def penalty(self, student: Taps, reference: Taps, batch: Batch) -> Tensor:
        tapped_BT = student.needs.states_BT
        assert tapped_BT is not None
        # Places, not a mask: each use of a mask would wait for the device.
        ours_N = self._mask(batch)[tapped_BT].nonzero()[:, 0]
        drifts = []
        for layer in self.layers:
            now_ND, then_ND = (
                taps.states[layer].index_select(0, ours_N) for taps in (student, reference)
            )
            drifts.append(relative_drift(now_ND, then_ND).sum())
        return torch.stack(drifts).sum()

    def _mask(self, batch: Batch) -> Tensor:
        return (batch["roles"] != Role.PAD) & ~batch["retain"][:, None]


def chosen_layers(config: LDIFS, number: int) -> tuple[int, ...]:
    """The layers of a model that has `number` of them."""
    if config.stride:
        return tuple(range(config.stride, number + 1, config.stride)) or (number,)
    if isinstance(config.layers, tuple):
        if max(config.layers) > number:
            raise DefenseError(
                f"defenses.ldifs.layers: the model has {number} layers, found {max(config.layers)}"
            )
        return tuple(sorted(config.layers))
    return tuple(sorted({round(layer) for layer in np.linspace(1, number, config.layers)}))
