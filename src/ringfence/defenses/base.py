"""The contract of a defense: what it needs and what it does. It knows nothing about how training runs.

A defense is one file with two classes. Its *config* (a pydantic model) holds the fields a recipe may set and makes the
defense with `build`. The *defense* overrides what it wants of the methods below.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..batch import Batch
from ..data import Example
from ..taps import Taps


@dataclass(frozen=True)
class Needs:
    """What a penalty wants from the one student forward and the one reference forward of a batch.

    hidden_BT: tokens whose final hidden states it compares; kv_BT: tokens whose keys and values it compares.
    """

    hidden_BT: Tensor | None = None
    kv_BT: Tensor | None = None


@dataclass(frozen=True)
class Setup:
    """What `build` may use: the retain examples of the recipe, and a reader for another source of rows."""

    retain: list[Example]
    read: Callable[[str], list[Example]]


class Defense:
    """Base of all defenses. The defaults do nothing.

    Attributes:
        name: the key in the recipe and in the logs.
        weight: factor of the penalty in the loss.
        every: the penalty acts on every k-th optimiser step, multiplied by k.
        riders: retain rows that ride in the batch for each training row; the cross-entropy does not see them.
    """

    name: str
    weight: float = 0.0
    every: int = 1
    riders: float = 0.0

    def change_data(self, examples: list[Example], rng: random.Random) -> list[Example]:
        """The training rows of one epoch. Called anew each epoch; must return equally many rows each time."""
        return examples

    def needs(self, batch: Batch) -> Needs:
        """What the penalty wants on this batch."""
        return Needs()

    def count(self, batch: Batch) -> int:
        """Number of tokens over which the penalty is a mean; it is summed over accumulation steps and ranks."""
        return 0

    def penalty(self, student: Taps, reference: Taps, batch: Batch) -> Tensor:
        """Sum of the penalty over its tokens in this batch (a scalar with gradient)."""
        raise NotImplementedError

    @property
    def has_penalty(self) -> bool:
        return type(self).penalty is not Defense.penalty


class DefenseConfig(BaseModel):
    """Base of all configs: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def build(self, setup: Setup) -> Defense:
        raise NotImplementedError


class PenaltyConfig(DefenseConfig):
    """Fields that every penalty has."""

    weight: float = Field(1.0, ge=0, description="factor of the penalty in the loss")
    every: int = Field(1, ge=1, description="use the penalty on every k-th optimiser step, multiplied by k (unbiased)")
