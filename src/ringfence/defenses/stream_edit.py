"""What steering and ablation share: they change the residual stream after some layers in training.

The edit acts on the training rows' tokens of the chosen roles. Padding is left alone, and so are a
penalty's extra retain rows: there the model is compared with the reference as it will be used,
without the edit. The reference is never edited, and the saved weights hold nothing of the edit.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..errors import DefenseError
from ..model.directions import Directions
from ..model.layers import decoder_layers
from ..text.batch import Batch
from ..text.roles import Role
from ..util.strict_yaml import Layer
from .base import Defense, DefenseConfig

RoleName = Literal["prefix", "query", "postfix", "response", "template"]


class StreamEditConfig(DefenseConfig):
    """Fields of a defense that edits the residual stream along given directions."""

    vectors: str = Field(
        "vectors.safetensors", description="file of directions (see ringfence persona extract)"
    )
    layers: tuple[Layer, ...] | None = Field(
        None, min_length=1, description="after which layers, from 1"
    )
    roles: tuple[RoleName, ...] | None = Field(
        None, min_length=1, description="token roles that are edited; null = every token"
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _one_layer(cls, layers: Any) -> Any:
        return (layers,) if isinstance(layers, int) else layers


class StreamEdit(Defense):
    """Hooks on decoder layers: their output h becomes `edit(h, layer)` at the chosen tokens."""

    whole_rows = True  # retain rows are not edited

    def __init__(self, config: StreamEditConfig) -> None:
        self.directions = Directions.load(Path(config.vectors))
        self.layers = self.directions.chosen(self.name, config.layers)
        self.roles = None if config.roles is None else [Role.parse(name) for name in config.roles]
        self._has_edited = False

    def start(self, model: Any) -> None:
        self.directions.check(model)

    def edit(self, hidden_BTD: Tensor, layer: int) -> Tensor:
        """The residual stream after `layer`, edited at every token; float32 in and out."""
        raise NotImplementedError

    def wrap(self, model: Any, batch: Batch) -> ExitStack:
        mask_BT1 = self._mask(batch)[..., None]
        packed_1N1 = mask_BT1[batch["attention_mask"].bool()][None]
        self._has_edited = self._has_edited or bool(mask_BT1.any())
        layers = decoder_layers(model)
        hooks = ExitStack()
        for number in self.layers:
            handle = layers[number - 1].register_forward_hook(
                self._hook(number, mask_BT1, packed_1N1)
            )
            hooks.callback(handle.remove)
        return hooks

    def after_step(self, model: Any, step: int) -> None:
        if not self._has_edited:
            names = ", ".join(role.name.lower() for role in self.roles or [])
            raise DefenseError(
                f"defenses.{self.name}.roles: no training row has a token of [{names}] up to step "
                f"{step}"
            )

    def _mask(self, batch: Batch) -> Tensor:
        roles_BT = batch["roles"]
        chosen = roles_BT != Role.PAD
        if self.roles is not None:
            chosen = torch.isin(roles_BT, torch.tensor(self.roles, device=roles_BT.device))
        return chosen & ~batch["retain"][:, None]

    def _hook(self, layer: int, mask_BT1: Tensor, packed_1N1: Tensor) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            hidden_BTD = output if isinstance(output, Tensor) else output[0]
            # No autocast: a projection in bf16 would leave a remainder.
            with torch.autocast(hidden_BTD.device.type, enabled=False):
                edited_BTD = self.edit(hidden_BTD.float(), layer).to(hidden_BTD.dtype)
            is_padded = hidden_BTD.shape[:2] == mask_BT1.shape[:2]
            edited_BTD = torch.where(mask_BT1 if is_padded else packed_1N1, edited_BTD, hidden_BTD)
            return edited_BTD if isinstance(output, Tensor) else (edited_BTD, *output[1:])

        return hook


def clash(edits: Sequence[StreamEditConfig]) -> str | None:
    """Why two edits cannot be combined, or None."""
    for one, other in combinations(edits, 2):
        if Path(one.vectors).resolve() != Path(other.vectors).resolve():
            continue
        both = sorted({*one.layers} & {*other.layers}) if one.layers and other.layers else None
        if both is None or both:
            where = f"at layers {both}" if both else "(name the layers of both to keep them apart)"
            return (
                f"{type(one).__name__.lower()} and {type(other).__name__.lower()} use the same "
                f"directions ({one.vectors}) {where}: one removes what the other adds"
            )
    return None
