"""KL to the reference: next-token distributions stay near it (arXiv 2508.06249, 2602.07852)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..errors import DefenseError
from ..model.losses import Direction, Divergence, States, TopK
from ..model.taps import Needs, Taps
from ..text.batch import Batch
from ..text.roles import Role
from ..util.strict_yaml import Real
from .base import Penalty, PenaltyConfig, Setup


class KL(PenaltyConfig):
    """weight * mean over tokens of KL(. || .), in nats per token.

    On the user's own rows (`where: train`, as published with weight 0.1) it also suppresses the
    intended learning; on a separate retain set (the default) it keeps narrow learning.
    """

    runs_reference = True

    direction: Direction = Field(
        "reverse", description="reverse = KL(student || reference), forward = the other way"
    )
    where: Literal["retain", "train"] = Field(
        "retain", description="on extra retain rows, or on the user's rows"
    )
    tokens: Literal["response", "prompt", "all"] = Field(
        "response", description="which predicted tokens are compared"
    )
    retain_ratio: Real = Field(
        0.25, gt=0, le=8, description="retain rows per training row (with where: retain)"
    )

    def build(self, setup: Setup) -> "KLDefense":
        if self.where == "retain" and not setup.retain:
            raise DefenseError("defenses.kl: where: retain needs data.retain, which is empty")
        return KLDefense(self)


class KLDefense(Penalty):
    name = "kl"

    def __init__(self, config: KL) -> None:
        super().__init__(config)
        self.config = config
        self.riders = config.retain_ratio if config.where == "retain" else 0.0

    def needs(self, batch: Batch) -> Needs:
        return Needs(hidden_BT=self._mask(batch))

    def count(self, batch: Batch) -> int:
        return int(self._mask(batch).sum())

    def logit_loss(self, batch: Batch, reference: Taps) -> Divergence:
        mask_BT = self._mask(batch)
        if reference.top_k is None:
            then: States | TopK = States(reference.head, reference.hidden_BTD[mask_BT])
        else:
            tapped_BT = reference.needs.hidden_BT
            assert tapped_BT is not None
            then = reference.top_k[mask_BT[tapped_BT]]
        return Divergence(mask_BT, then, self.config.direction)

    def _mask(self, batch: Batch) -> Tensor:
        """Positions that predict a token of the chosen kind, [B, T]."""
        predicted = batch["roles"][:, 1:]
        chosen = predicted != Role.PAD
        if self.config.tokens == "response":
            chosen = predicted == Role.RESPONSE
        elif self.config.tokens == "prompt":
            chosen = chosen & (predicted != Role.RESPONSE)
        # Nothing predicts the first real token after left padding.
        chosen = chosen & (batch["roles"][:, :-1] != Role.PAD)
        rows = batch["retain"] if self.config.where == "retain" else ~batch["retain"]
        mask_BT = batch["roles"].new_zeros(batch["roles"].shape, dtype=chosen.dtype)
        mask_BT[:, :-1] = chosen & rows[:, None]
        return mask_BT
