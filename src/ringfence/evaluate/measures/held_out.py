"""A user's own held-out rows: loss on their responses, and exact match of greedy answers.

Does not know training; rows are of any form and source that `data` reads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PositiveInt

from ...errors import ChatError, DataError
from ...runfolder.record import Runs
from ...stats import Interval, rate_interval, ratio_interval
from ...text.held_out import load
from ...text.roles import Messages, Row, is_learnt
from ...util.strict_yaml import Whole
from .base import Asked, Criterion, Entry, Fields, MeasuredModel, Measurement, Number

_TITLES = {
    "exact": "held-out rows, exact",
    "loss": "held-out rows, loss",
    "change": "held-out rows, change of loss",
}


@dataclass(frozen=True)
class HeldOut:
    """`loss` in nats per response token, `exact` the share of responses reproduced word for word
    (None if not asked), `change` of the loss against the reference (None if there is none)."""

    loss: Interval
    exact: Interval | None
    change: Interval | None = None


def measure(
    model: MeasuredModel, rows: Sequence[Row], max_new_tokens: int = 64
) -> list[dict[str, Any]]:
    """Scores every response of every row, given the true turns before it, and answers the same
    prompts greedily.

    Args:
        max_new_tokens: of an answer; 0 = only the loss.

    Returns:
        For each response: origin of its row, logprob (sum over its tokens, end of turn included,
        nats), tokens; where asked, expected, answer and exact (equal but for white space).

    Raises:
        DataError: the chat template refuses a row.
    """
    _check(model, rows)
    turns = [(row, at) for row in rows for at in _responses(row)]
    prompts = [row.messages[:at] for row, at in turns]
    scores = [found[0] for found in model.score(prompts, [[r.messages[at]] for r, at in turns])]
    items = [
        {"origin": row.origin, "logprob": score.logprob, "tokens": score.tokens}
        for (row, _), score in zip(turns, scores)
    ]
    if not max_new_tokens:
        return items
    expected = [model.as_generated(row.messages[: at + 1]) for row, at in turns]
    answers = model.generate(prompts, max_new_tokens)
    return [
        {**item, "expected": e, "answer": a, "exact": a.split() == e.split()}
        for item, e, a in zip(items, expected, answers)
    ]


def summary(
    items: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]] | None = None
) -> HeldOut:
    """Loss and exact match with 95 % intervals over rows: the responses of one row are drawn
    together. With the `reference`'s items, also the change of the loss."""
    tokens, loss = (_by_origin(items, name) for name in ("tokens", "logprob"))
    exact = change = None
    if "exact" in items[0]:
        origins = [item["origin"] for item in items]
        exact = rate_interval([float(item["exact"]) for item in items], origins)
    if reference:
        before = _by_origin(reference, "logprob")
        change = ratio_interval([b - a for a, b in zip(loss, before)], tokens)
    return HeldOut(ratio_interval([-x for x in loss], tokens), exact, change)


def _by_origin(items: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Sums over the responses of each row, which are not independent."""
    sums: dict[str, float] = {}
    for item in items:
        sums[item["origin"]] = sums.get(item["origin"], 0.0) + item[name]
    return list(sums.values())


def _responses(row: Row) -> list[int]:
    return [at for at, message in enumerate(row.messages) if is_learnt(message)]


def _check(model: MeasuredModel, rows: Sequence[Row]) -> None:
    for row in rows:
        try:
            model.check(row.messages)
        except ChatError as error:
            raise DataError(f"{row.origin}: {error}") from error


# ------------------------------------------------------------------ the measurement


class HeldOutFields(Fields):
    held_out: str | None = Field(
        None, description="your own held-out rows: loss and exact match of their responses"
    )
    held_out_tokens: Whole = Field(
        64, ge=0, le=2**20, description="longest greedy answer to them; 0 = loss only"
    )


class HeldOutItem(Entry):
    origin: str
    tokens: PositiveInt
    logprob: float
    exact: bool = False  # of all rows or of none


class HeldOutRows(Measurement):
    """Loss and exact match of held-out rows."""

    part = "held_out"
    fields = HeldOutFields
    shape = list[HeldOutItem]
    identity = ("origin",)
    names = tuple(f"held_out.{name}" for name in _TITLES)

    def parts(self, config: HeldOutFields) -> dict[str, list[Any]]:
        return {"held_out": load(config.held_out)} if config.held_out else {}

    def texts(self, item: Row, config: HeldOutFields) -> list[tuple[Messages, int]]:
        turns = _responses(item)
        scored = [(item.messages[: at + 1], 0) for at in turns]
        tokens = config.held_out_tokens
        return scored + [(item.messages[:at], tokens) for at in turns if tokens]

    def measure(
        self, part: str, items: list[Row], model: MeasuredModel, config: HeldOutFields
    ) -> list[dict[str, Any]]:
        return measure(model, items, config.held_out_tokens)

    def learnt(self, config: HeldOutFields) -> list[str]:
        return [f"the rows of {config.held_out}"] if config.held_out else []

    def complaint(self, value: Any) -> str:
        if len({"exact" in item for item in value}) > 1:
            return "some rows have exact and some have not"
        return super().complaint(value)

    def asked(self, runs: Runs) -> dict[str, Asked]:
        items = runs.run.results.get("held_out", [])
        asked = frozenset((item["origin"], item["tokens"]) for item in items)
        return {"held_out": Asked(self.set_title("held_out"), asked)} if asked else {}

    def read(self, runs: Runs) -> HeldOut | None:
        tuned, reference = (p.get("held_out") for p in (runs.run.results, runs.run.reference))
        return summary(tuned, reference) if tuned else None

    def is_share(self, path: str) -> bool:
        return path == ".exact"

    def numbers(self, found: HeldOut) -> Iterator[Number]:
        place: dict[str, Any] = {"level": "run", "item": "held_out"}
        if found.exact:
            yield Number(
                "held_out.exact",
                found.exact,
                "share",
                "exact_match",
                **place,
                side="tuned",
                cluster="row",
                title=_TITLES["exact"],
            )
        yield Number(
            "held_out.loss",
            found.loss,
            "loss",
            "loss",
            **place,
            side="tuned",
            cluster="row",
            title=_TITLES["loss"],
        )
        if found.change:
            yield Number(
                "held_out.change",
                found.change,
                "change",
                "loss",
                **place,
                side="change",
                cluster="row",
                title=_TITLES["change"],
            )

    def set_title(self, name: str) -> str:
        return "held-out rows"

    def criterion(self, name: str) -> Criterion:
        return "narrow"


MEASUREMENT = HeldOutRows()
