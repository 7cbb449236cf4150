"""The contract of a defense: what it needs and what it does, not how training runs.

A defense is one file with two classes. Its *config* (a pydantic model) holds the fields a recipe
may set and makes the defense with `build`. The *defense* overrides the methods below that it needs.
"""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..model.losses import LogitLoss
from ..model.taps import CommonPrefix, Needs, Taps
from ..text.batch import Batch, Example
from ..text.chat import Chat
from ..text.roles import Messages, Row
from ..util.strict_yaml import Real, Whole

if TYPE_CHECKING:
    from ..text.queries import Query

# For defenses that change weights between steps: DeepSpeed keeps its own copy of the weights.
UNDONE = "DeepSpeed would undo it after each step; accepted: DDP, FSDP2"
# For defenses that read the base's weights, when an adapter is trained further.
TAKES_THE_BASE = "would take its base for the reference"


@dataclass(frozen=True)
class Setup:
    """What `build` may use: the chat template, the recipe's retain examples, a reader for other
    sources of rows, the name of the reference model, the training rows, the queries of the retain
    rows, and the recipe's seed."""

    chat: Chat
    retain: list[Example]
    read: Callable[[str], list[Example]]
    model: str
    rows: Sequence[Row] = ()
    retain_queries: "Sequence[Query]" = ()
    seed: int = 0


class Defense:
    """Base of all defenses. The defaults do nothing.

    A defense that adds to the loss has a `penalty`, or a `logit_loss` if it is a loss on the
    student's next-token distributions: those share one pass over the student's logits with the
    cross-entropy.

    Attributes:
        name: the key in the recipe and in the logs.
        weight: factor of the penalty in the loss.
        every: k; the penalty acts on every k-th optimiser step, multiplied by k.
        riders: extra retain rows per training row; the cross-entropy does not see them.
        whole_rows: its effect on a token depends on the whole row, so the student's rows may not
            share the computation of their common first tokens, except through `cached_prefix`.
    """

    name: str
    weight: float = 0.0
    every: int = 1
    riders: float = 0.0
    whole_rows: bool = False

    def change_data(self, examples: list[Example], rng: random.Random) -> list[Example]:
        """The training rows of one epoch. Called each epoch; must always return the same number."""
        return examples

    def before_adapter(self, reference: Any) -> int:
        """Once before training, with the reference before it gets an adapter. Returns the first
        layer, from 1, that the adapter may be on. Not called if there is none."""
        return 1

    def start(self, model: Any) -> None:
        """Once before training, with the model as it is before any update or checkpoint."""

    def needs(self, batch: Batch) -> Needs:
        """What the penalty needs of this batch's one student forward and one reference forward."""
        return Needs()

    def count(self, batch: Batch) -> int:
        """Number of tokens the penalty is a mean over; summed over accumulation steps and ranks."""
        return 0

    def penalty(self, student: Taps, reference: Taps, batch: Batch) -> Tensor:
        """Sum of the penalty over its tokens in this batch (a scalar with gradient)."""
        raise NotImplementedError

    def logit_loss(self, batch: Batch, reference: Taps) -> LogitLoss | None:
        """Or: the penalty as a loss on next-token distributions, summed over its mask [B, T]."""
        return None

    def cached_prefix(self, model: Any, batch: Batch, needs: Needs) -> CommonPrefix | None:
        """Common first tokens of the rows, if they need no computing; None for packed rows."""
        return None

    def wrap(self, model: Any, batch: Batch) -> AbstractContextManager[Any]:
        """A context around the student's forward and backward on this batch, for hooks."""
        return nullcontext()

    def observe(self, mean: float) -> None:
        """After each optimiser step in which the penalty acted: its mean over that step."""

    def after_step(self, model: Any, step: int) -> None:
        """After each optimiser step; steps count from 1."""

    def finish(self, model: Any) -> None:
        """Once after training, before the weights are saved."""

    def save(self, folder: Path) -> None:
        """Adds what loading needs to the folder of the saved weights."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as plain JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""

    def record(self) -> dict[str, Any]:
        """What the run's record says of this defense, as plain JSON values."""
        return {}

    @property
    def has_penalty(self) -> bool:
        return (
            type(self).penalty is not Defense.penalty
            or type(self).logit_loss is not Defense.logit_loss
        )


@dataclass(frozen=True)
class Training:
    """How weights will be trained, because a defense may not support it.

    Attributes:
        further: the model is an adapter that is trained further, and a copy of it is the reference.
        deepspeed: ZeRO's stage; None without DeepSpeed.
    """

    method: Literal["lora", "full"]
    further: bool = False
    deepspeed: int | None = None


class DefenseConfig(BaseModel):
    """Base of all configs: unknown fields are refused.

    Attributes:
        runs_reference: its penalty needs a forward pass of the reference on the rows it acts on.
        is_auto: a pilot run must choose the token roles it acts on (see `resolve`).
        disguise: a system prompt under which the tuned model is also measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    runs_reference: ClassVar[bool] = False

    @property
    def is_auto(self) -> bool:
        return False

    @property
    def disguise(self) -> str | None:
        return None

    def build(self, setup: Setup) -> Defense:
        """The defense. Raises DefenseError if it cannot work with these rows or this template."""
        raise NotImplementedError

    def refuses(self, training: Training) -> str | None:
        """Why it cannot be used in this kind of training, as `field: reason`; None if it can."""
        return None

    def resolve(self, role: str) -> "DefenseConfig":
        """The same, acting on the token role that a pilot chose."""
        raise NotImplementedError

    def change_messages(self, messages: Messages) -> Messages:
        """A training conversation, as this defense changes it."""
        return messages


class PenaltyConfig(DefenseConfig):
    """Fields that every penalty has."""

    weight: Real = Field(1.0, ge=0, le=1e09, description="factor of the penalty in the loss")
    budget: Real | None = Field(
        None,
        gt=0,
        le=1e09,
        description="instead of a fixed weight: the mean penalty to allow; the weight adapts to it",
    )
    every: Whole = Field(
        1,
        ge=1,
        le=10**9,
        description="use the penalty on every k-th optimiser step, multiplied by k (unbiased)",
    )

    @model_validator(mode="after")
    def _weight_or_budget(self) -> Self:
        if self.budget is not None and self.weight != type(self).model_fields["weight"].default:
            raise ValueError(
                f"set weight or budget, not both (found weight {self.weight}, budget {self.budget})"
            )
        return self


class Penalty(Defense):
    """A defense with a penalty: of fixed weight, or of a weight that adapts to a budget."""

    def __init__(self, config: PenaltyConfig) -> None:
        self.weight, self.every, self.budget = config.weight, config.every, config.budget
        self._start, self._ascended = config.weight, 0.0

    def observe(self, mean: float) -> None:
        """Raises the weight while the penalty is above its budget and lowers it while below.

        Ascent on the dual variable of `penalty <= budget`, in log space, so that one rate suits
        every unit, plus a part in proportion to the present excess: a penalty responds to its
        weight only some ten steps later, and ascent alone would oscillate around the budget (arXiv
        2007.03964).
        """
        if self.budget is not None:
            excess = max(-1.0, min(1.0, mean / self.budget - 1))
            self._ascended += DUAL_RATE * excess
            self.weight = self._start * math.exp(self._ascended + PROPORTION * excess)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.budget is None else {"weight": self.weight, "ascended": self._ascended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = state.get("weight", self.weight)
        self._ascended = state.get("ascended", self._ascended)

    def record(self) -> dict[str, Any]:
        return {} if self.budget is None else {"budget": self.budget, "weight": self.weight}


DUAL_RATE, PROPORTION = 0.2, 2.0
