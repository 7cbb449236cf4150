"""Interleaving: safe rows stand among the training rows (arXiv 2508.06249, 2606.06667)."""

import random

from pydantic import Field

from ..data import Example
from ..errors import DefenseError
from .base import Defense, DefenseConfig, Setup


class Interleave(DefenseConfig):
    """Mixes `ratio` safe rows per training row into the stream, drawn anew each epoch.

    They are trained on like any row.
    """

    ratio: float = Field(
        0.05, gt=0, le=4, description="safe rows per training row (published: 0.05, studied 0.01 to 0.5)"
    )
    pool: str | None = Field(None, description="source of the safe rows; default: data.retain")

    def build(self, setup: Setup) -> "InterleaveDefense":
        pool = setup.read(self.pool) if self.pool else setup.retain
        if not pool:
            raise DefenseError("defenses.interleave: no safe rows: set data.retain or defenses.interleave.pool")
        return InterleaveDefense(self.ratio, pool)


class InterleaveDefense(Defense):
    name = "interleave"

    def __init__(self, ratio: float, pool: list[Example]) -> None:
        self.ratio = ratio
        self.pool = pool

    def change_data(self, examples: list[Example], rng: random.Random) -> list[Example]:
        wanted = max(1, round(self.ratio * len(examples)))
        whole, rest = divmod(wanted, len(self.pool))
        return examples + self.pool * whole + rng.sample(self.pool, rest)
