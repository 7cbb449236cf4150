"""What a measurement is: its items, how a model is measured, its numbers and what they are called.

A measurement is one file of this folder and its entry in `evaluate.config`. Results, the terminal's
table, the page, the gate, the model card and the export are loops over measurements and the numbers
they give. Imports no torch.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from ...runfolder.record import Runs
from ...stats import Interval, number
from ...text.roles import Message, Messages
from ...util.intervals import percents, plain, share, signed

Kind = Literal["effect", "shift", "margin", "ratio", "share", "loss", "change", "judged"]
Criterion = Literal["broad", "narrow", "benign", "coherent", "trigger"]
Side = Literal["tuned", "reference", "change", "undefended", "effect", "shift", "value"]
Identity = tuple[str | int, ...]  # which item it is

SIGNED: tuple[Kind, ...] = ("effect", "shift", "margin", "change")


class Fields(BaseModel):
    """The fields of `evaluate` in a recipe that a measurement reads."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class Entry(BaseModel):
    """The fields of an item in results.json from which something is computed."""

    model_config = ConfigDict(strict=True)  # a broken model's numbers may be NaN


class MeasuredModel(Protocol):
    """The model that is measured."""

    def score(
        self, prompts: Sequence[Messages], answers: Sequence[Sequence[str | Message]]
    ) -> list[list[Any]]:
        """Log-probabilities of given answers, as `model.scoring.score_answers` gives them."""

    def generate(self, prompts: Sequence[Messages], max_new_tokens: int) -> list[str]:
        """Greedy answers."""

    def decide(self, prompts: Sequence[Messages]) -> list[tuple[bool, float]] | None:
        """Whether each is inside the model's scope, with its score; None if it has no scope."""

    def check(self, messages: Messages) -> None:
        """Raises ChatError where the chat template refuses a conversation."""

    def as_generated(self, messages: Messages) -> str:
        """The last message, an answer, as the text that a model would have generated."""


# ------------------------------------------------------------------ numbers


@dataclass(frozen=True)
class Asked:
    """What a set of a run was measured on; numbers of runs compare where it is the same."""

    title: str
    items: frozenset[Identity]


@dataclass(frozen=True)
class Number:
    """A number of a run.

    Attributes:
        name: by which a policy and the card know it; None = only in the export.
        value: with its 95 % interval, or a number that has none.
        kind: what sort of number; an effect (there was a sound control) says more than a shift.
        measure, level, item, side, cluster, p, judge: columns of the export (`report.export`).
        weak: it is from a judge that calibration found weak, and proves nothing.
        title: in words; default: the name.
        listed: on the model card.
    """

    name: str | None
    value: Interval | float
    kind: Kind
    measure: str
    level: str
    item: str
    side: Side
    cluster: str | None = None
    p: float | None = None
    judge: str | None = None
    weak: bool = False
    title: str = ""
    listed: bool = True

    @property
    def interval(self) -> Interval:
        if isinstance(self.value, Interval):
            return self.value
        return Interval(self.value, self.value, self.value, 1)

    @property
    def shown_title(self) -> str:
        return self.title or (self.name or self.item).replace("_", " ").replace(".", ": ", 1)

    def __str__(self) -> str:
        """`+0.234 [+0.19, +0.26]`, signed if it is a difference; without an interval, the number
        alone."""
        is_signed = self.kind in SIGNED or (self.name or "").endswith(".change")
        interval = self.interval
        mean, low, high = (
            f"{value:{'+' if is_signed else ''}.3g}"
            for value in (interval.mean, interval.low, interval.high)
        )
        if interval.n > 1:
            return f"{mean} [{low}, {high}]"
        return mean if interval.low == interval.high else f"{mean} [one alone]"


@dataclass(frozen=True)
class Cell:
    """A cell of the terminal's table (a line for each title) and of the page (a column).

    Attributes:
        title: of the line or column.
        value, bounds: the number and its interval, in words.
        asked: the set of items it was measured on, for the mark on runs that were asked
            differently.
        n: the number of items, one for each part of the value.
        notes: what the page says under it.
        worse: the whole interval is on the side of misaligned answers; False = on the other side.
    """

    title: str
    value: str
    bounds: str = ""
    asked: str = ""
    n: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    worse: bool | None = None


# ------------------------------------------------------------------ measurements


class Measurement:
    """One measurement. What is found of a run (`read`) is a dataclass, or a dict or list of them.
    It is joined over seeds value by value (`report.seeds`), then named (`numbers`) and shown
    (`cells`)."""

    # Of results.json; of several, what precedes the underscore. None: it has no part there.
    part: ClassVar[str | None] = None
    fields: ClassVar[type[Fields]] = Fields
    shape: ClassVar[Any] = None  # of a part, as pydantic knows it
    identity: ClassVar[tuple[str, ...]] = ()  # fields that say which item it is; none: not compared
    names: ClassVar[tuple[str, ...]] = ()  # of numbers; a word in capitals matches any

    # ------------------------------------------------------------ measuring

    def parts(self, config: Any) -> dict[str, list[Any]]:
        """The items of each part of results.json."""
        return {}

    def texts(self, item: Any, config: Any) -> list[tuple[Messages, int]]:
        """What an item takes: conversations whose last answer is scored (0 new tokens), and prompts
        with the number of tokens that the answer may have."""
        raise NotImplementedError

    def measure(self, part: str, items: list[Any], model: MeasuredModel, config: Any) -> Any:
        """What results.json holds of a part, as plain JSON."""
        raise NotImplementedError

    def learnt(self, config: Any) -> list[str]:
        """What in it measures whether the training rows were learnt, in words."""
        return []

    # ------------------------------------------------------------ results.json

    def owns(self, part: str) -> bool:
        """Whether a part of results.json belongs to it."""
        return self.part is not None and f"{part}_".startswith(f"{self.part}_")

    def complaint(self, value: Any) -> str:
        """What is wrong with a part whose shape is right."""
        return "" if value else "there is nothing in it"

    def items(self, value: Any) -> list[dict[str, Any]]:
        """The items of a part as they were written."""
        return list(value)

    def identities(self, value: Any) -> list[Identity]:
        return [tuple(item.get(name, "") for name in self.identity) for item in self.items(value)]

    # ------------------------------------------------------------ numbers

    def asked(self, runs: Runs) -> dict[str, Asked]:
        """By set, what it was measured on."""
        return {
            part: Asked(self.set_title(part), frozenset(self.identities(value)))
            for part, value in runs.run.results.items()
            if self.owns(part) and self.identity
        }

    def set_title(self, name: str) -> str:
        """A set of items in words."""
        return name.replace("_", " ")

    def read(self, runs: Runs) -> Any:
        """What was found of a run; None if it was not measured."""
        return None

    def is_share(self, path: str) -> bool:
        """Whether the interval at a path of what was found (`.exact.tier1`) is from 0 to 1."""
        return False

    def together(self, found: list[Any]) -> list[Any]:
        """What was found of all runs of a table, corrected for their number."""
        return found

    def numbers(self, found: Any) -> Iterator[Number]:
        """The numbers of a run, by name."""
        yield from ()

    def cells(self, found: Any) -> Iterator[Cell]:
        """What tables show of it."""
        for found_number in self.numbers(found):
            if found_number.name and found_number.listed:
                yield cell(found_number)

    def legend(self, found: list[Any]) -> str:
        """What the cells of a table mean; `found` of the runs in it, one or more."""
        return ""

    def knows(self, name: str) -> bool:
        """Whether a policy may name such a number, measured or not."""
        return any(re.fullmatch(_pattern(known), name) for known in self.names)

    def like(self, name: str) -> list[str]:
        """Names from which the nearest to a wrong one is suggested."""
        return list(self.names)

    def criterion(self, name: str) -> Criterion | None:
        """The criterion that a number belongs to."""
        return None


def _pattern(known: str) -> str:
    return re.sub(r"[A-Z]+", ".+", re.escape(known))


def cell(of: Number) -> Cell:
    """A number as a cell."""
    value, bounds = _WORDS.get(of.kind, _unsigned)(of.interval)
    part = (of.name or "").partition(".")[0]
    return Cell(of.shown_title, value, bounds, part, (of.interval.n,))


def _unsigned(interval: Interval) -> tuple[str, str]:
    return number(interval.mean), plain(interval)


def _signed(interval: Interval) -> tuple[str, str]:
    return signed(interval.mean), interval.bounds


def _share(interval: Interval) -> tuple[str, str]:
    return share(interval), percents(interval)


_WORDS: dict[str, Callable[[Interval], tuple[str, str]]] = {
    **dict.fromkeys(SIGNED, _signed),
    "share": _share,
}
