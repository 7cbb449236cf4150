"""Interleaving: safe rows are mixed into the training rows (arXiv 2508.06249, 2606.06667).

They are drawn at random, or are those with the largest perplexity gap (Interleaving+ and ++).
"""

import random
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..errors import DefenseError
from ..model.fingerprint import fingerprint
from ..prepare.gap_table import read_table
from ..text.batch import Example
from ..text.rows import load_rows
from ..util.journal import digest
from ..util.strict_yaml import Real
from .base import Defense, DefenseConfig, Setup


class Interleave(DefenseConfig):
    """Mixes `ratio` safe rows per training row into the stream, and trains on them like on any row.

    They are drawn again each epoch, or chosen by perplexity gap.
    """

    ratio: Real = Field(
        0.05,
        gt=0,
        le=4,
        description="safe rows per training row (published: 0.05, studied 0.01 to 0.5)",
    )
    pool: str | None = Field(None, description="source of the safe rows; default: data.retain")
    select: Literal["random", "gap"] = Field(
        "random",
        description="random, or gap: the rows with the largest perplexity gap, the same in each "
        "epoch",
    )
    scores: str | None = Field(
        None, description="for gap: the table that `ringfence score-gap` made of the pool"
    )
    leave_out: tuple[str, ...] = Field(
        (), description="for gap: adapters of the table that are not counted"
    )
    drop_refusals: bool = Field(
        False, description="for gap: skip answers that begin with a refusal"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.select == "gap" and not (self.pool and self.scores):
            raise ValueError(
                "select: gap needs pool (what was scored) and scores (the table of `ringfence "
                "score-gap`)"
            )
        if self.select == "random" and (self.scores or self.leave_out or self.drop_refusals):
            raise ValueError("scores, leave_out and drop_refusals need select: gap")
        return self

    def build(self, setup: Setup) -> "InterleaveDefense":
        pool = setup.read(self.pool) if self.pool else setup.retain
        if not pool:
            raise DefenseError(
                "defenses.interleave: no safe rows: set data.retain or defenses.interleave.pool"
            )
        if self.select == "random":
            return InterleaveDefense(self.ratio, pool)
        return InterleaveDefense(self.ratio, self._best(pool, setup.model), ranked=True)

    def _best(self, pool: list[Example], model: str) -> list[Example]:
        """Distinct conversations of the pool, largest gap first, without refusals if configured."""
        assert self.pool is not None
        assert self.scores is not None
        table = read_table(self.scores)
        if table.model != fingerprint(model):
            raise DefenseError(
                f"defenses.interleave.scores: {self.scores} has scores of another model than "
                f"{model}; run `ringfence score-gap` with it"
            )
        scores = table.scores(self.leave_out)
        digests = {row.origin: digest(row.messages) for row in load_rows(self.pool)}
        unknown = sum(key not in scores for key in digests.values())
        if unknown:
            raise DefenseError(
                f"defenses.interleave.scores: {unknown} of {len(digests)} rows of {self.pool} have "
                f"no score in {self.scores}: the pool has changed since, or scoring was not "
                "finished; run `ringfence score-gap`"
            )
        distinct: dict[str, Example] = {}
        for example in pool:
            distinct.setdefault(digests[example.origin], example)
        kept = [key for key in distinct if not (self.drop_refusals and table.lines[key]["refusal"])]
        if not kept:
            raise DefenseError(
                f"defenses.interleave.drop_refusals: every row of {self.pool} is a refusal"
            )
        return [distinct[key] for key in sorted(kept, key=lambda key: -scores[key])]


class InterleaveDefense(Defense):
    """Args: the ratio, the pool, and whether it is ranked, so that the first rows are taken instead
    of drawn ones."""

    name = "interleave"

    def __init__(self, ratio: float, pool: list[Example], ranked: bool = False) -> None:
        self.ratio = ratio
        self.pool = pool
        self.ranked = ranked
        self._identity = digest([example.input_ids for example in pool])

    def change_data(self, examples: list[Example], rng: random.Random) -> list[Example]:
        wanted = max(1, round(self.ratio * len(examples)))
        whole, rest = divmod(wanted, len(self.pool))
        chosen = self.pool[:rest] if self.ranked else rng.sample(self.pool, rest)
        return examples + self.pool * whole + chosen

    def state_dict(self) -> dict[str, Any]:
        return {"pool": self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["pool"] != self._identity:
            raise DefenseError(
                "defenses.interleave: the pool or its scores have changed since the run began; "
                "choose another output, or put them back"
            )
