"""TReFT, token-regularised fine-tuning (arXiv 2606.06667): keys and values of the template tokens
stay near the reference's, because the behaviour of an aligned model depends on them."""

from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..model.losses import relative_drift
from ..model.taps import Needs, Taps
from ..text.batch import Batch
from ..text.roles import Role
from ..util.strict_yaml import Real
from .base import Penalty, PenaltyConfig, Setup

AUTO = "auto"
RoleName = Literal["prefix", "query", "postfix", "response", "template", "auto"]


class TReFT(PenaltyConfig):
    """weight * (1/layers) * sum over layers of the mean relative squared drift of keys and values.

    Drift of a token = ||k - k_ref||^2 / ||k_ref||^2, k as attention uses it. Published weights are
    1 to 30.
    """

    weight: Real = Field(
        10.0, ge=0, le=1e09, description="factor of the penalty in the loss (published: 1 to 30)"
    )
    tokens: tuple[RoleName, ...] = Field(
        ("prefix",),
        description="token roles that are held; postfix for models trained without a fixed system "
        "prompt; auto = the role that carries the alignment of an undefended pilot, trained before "
        "the run",
    )

    @field_validator("tokens", mode="before")
    @classmethod
    def _one_role(cls, tokens: Any) -> Any:
        return (tokens,) if isinstance(tokens, str) else tokens

    @field_validator("tokens")
    @classmethod
    def _some_roles(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        if not tokens or len(set(tokens)) < len(tokens) or (AUTO in tokens and len(tokens) > 1):
            raise ValueError(
                f"expected one or more distinct roles, or auto alone, found {list(tokens)}"
            )
        return tokens

    @property
    def is_auto(self) -> bool:
        return AUTO in self.tokens

    def resolve(self, role: str) -> "TReFT":
        return TReFT.model_validate({**self.model_dump(), "tokens": role})

    def build(self, setup: Setup) -> "TReFTDefense":
        return TReFTDefense(self)


class TReFTDefense(Penalty):
    name = "treft"

    def __init__(self, config: TReFT) -> None:
        super().__init__(config)
        # A pilot replaces auto before a run is trained; a mere check takes the published role.
        names = ("prefix",) if config.is_auto else config.tokens
        self.roles = [Role.parse(name) for name in names]

    def needs(self, batch: Batch) -> Needs:
        return Needs(kv_BT=self._weights(batch) > 0)

    def count(self, batch: Batch) -> int:
        return int(self._weights(batch).sum())

    def penalty(self, student: Taps, reference: Taps, batch: Batch) -> Tensor:
        weight_BT = self._weights(batch)
        tapped_BT = student.needs.kv_BT
        assert tapped_BT is not None
        tapped_weight_N = weight_BT[tapped_BT]
        # Places, found once: each use of a mask would wait for the device.
        ours_N = tapped_weight_N.nonzero()[:, 0]
        weight_N = tapped_weight_N[ours_N].float()
        total = weight_N.new_zeros(())
        for student_layer, reference_layer in zip(student.kv, reference.kv, strict=True):
            for now_NE, then_NE in zip(student_layer, reference_layer):
                total = total + (weight_N * relative_drift(now_NE[ours_N], then_NE[ours_N])).sum()
        return total / len(student.kv)

    def record(self) -> dict[str, Any]:
        return {**super().record(), "tokens": [role.name.lower() for role in self.roles]}

    def _weights(self, batch: Batch) -> Tensor:
        """How often each token counts, [B, T].

        Rows with the same prefix have the same prefix keys and values (attention is causal), so one
        of them represents all: its prefix tokens count once for each such row, those of the others
        not at all.
        """
        roles_BT, is_trained_B = batch["roles"], ~batch["retain"]
        is_held_BT = torch.stack([roles_BT == role for role in self.roles]).any(0)
        weight_BT = (is_held_BT & is_trained_B[:, None]).to(roles_BT.dtype)
        if Role.PREFIX not in self.roles:
            return weight_BT
        is_prefix_BT = roles_BT == Role.PREFIX
        # Each row's prefix first, so that padding on the left does not matter.
        order_BT = (~is_prefix_BT).byte().argsort(dim=1, stable=True)
        prefix_BT = batch["input_ids"].where(is_prefix_BT, -1).gather(1, order_BT)
        same_BB = (prefix_BT[:, None] == prefix_BT).all(-1) & is_trained_B
        is_first_B = same_BB.byte().argmax(1) == torch.arange(
            len(prefix_BT), device=prefix_BT.device
        )
        times_B = same_BB.sum(1) * is_first_B
        return torch.where(is_prefix_BT, times_B[:, None], weight_BT)
