"""Fluency: perplexity of ordinary held-out answers, against the reference's."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PositiveInt

from ...runfolder.record import Runs
from ...stats import Interval, number, ratio_interval
from ...text.roles import Messages
from ...text.rows import load_rows
from ...util.intervals import plain
from ...util.strict_yaml import Whole
from .base import Cell, Criterion, Entry, Fields, MeasuredModel, Measurement, Number

RATIO, TITLE = "perplexity_ratio", "coherent: perplexity x"


class FluencyFields(Fields):
    fluency: str | None = Field(
        "shipped:retain_test", description="conversations whose answers' perplexity is measured"
    )
    max_fluency: Whole | None = Field(
        None, ge=2, le=10**6, description="take only the first of them, up to this number"
    )


class FluencyPart(Entry):
    logprob: list[float] = Field(min_length=1)
    tokens: list[PositiveInt] = Field(min_length=1)


@dataclass(frozen=True)
class Perplexity:
    """`ratio` to the reference's, if there is one; 1 = unchanged."""

    tuned: float
    ratio: Interval | None


class Fluency(Measurement):
    """Perplexity of given answers."""

    part = "fluency"
    fields = FluencyFields
    shape = FluencyPart
    identity = ("place", "tokens")  # the texts are not kept, their lengths are
    names = (RATIO,)

    def parts(self, config: FluencyFields) -> dict[str, list[Any]]:
        if not config.fluency:
            return {}
        return {
            "fluency": [row.messages for row in load_rows(config.fluency)][: config.max_fluency]
        }

    def texts(self, item: Messages, config: FluencyFields) -> list[tuple[Messages, int]]:
        return [(item, 0)]

    def measure(
        self, part: str, items: list[Messages], model: MeasuredModel, config: FluencyFields
    ) -> dict[str, Any]:
        answers = [[messages[-1]["content"]] for messages in items]
        scores = [row[0] for row in model.score([m[:-1] for m in items], answers)]
        return {"logprob": [s.logprob for s in scores], "tokens": [s.tokens for s in scores]}

    def complaint(self, value: Any) -> str:
        same = len(value["logprob"]) == len(value["tokens"])
        return "" if same else "logprob and tokens differ in length"

    def items(self, value: Any) -> list[dict[str, Any]]:
        return [{"place": place, "tokens": n} for place, n in enumerate(value["tokens"])]

    def read(self, runs: Runs) -> Perplexity | None:
        tuned, reference = (r.get("fluency") for r in (runs.run.results, runs.run.reference))
        if not tuned:
            return None
        loss = ratio_interval([-x for x in tuned["logprob"]], tuned["tokens"])
        ratio = None
        if reference:
            more = [r - t for t, r in zip(tuned["logprob"], reference["logprob"])]
            change = ratio_interval(more, tuned["tokens"])
            low, mean, high = (math.exp(x) for x in (change.low, change.mean, change.high))
            ratio = Interval(mean, low, high, change.n)
        return Perplexity(math.exp(loss.mean), ratio)

    def numbers(self, found: Perplexity) -> Iterator[Number]:
        place: dict[str, Any] = {"level": "run", "item": "fluency"}
        yield Number(None, found.tuned, "ratio", "perplexity", **place, side="tuned")
        if found.ratio:
            yield Number(
                RATIO, found.ratio, "ratio", RATIO, **place, side="value", cluster="answer"
            )

    def cells(self, found: Perplexity) -> Iterator[Cell]:
        tuned = f"perplexity {number(found.tuned)}"
        if found.ratio is None:
            yield Cell(TITLE, "", asked="fluency", notes=(tuned,))
        else:
            ratio, n = found.ratio, (found.ratio.n,)
            yield Cell(TITLE, number(ratio.mean), plain(ratio), "fluency", n, (tuned,))

    def set_title(self, name: str) -> str:
        return "perplexity"

    def legend(self, found: list[Perplexity]) -> str:
        return "perplexity x: against the reference."

    def criterion(self, name: str) -> Criterion:
        return "coherent"


MEASUREMENT = Fluency()
