"""The contract of a diagnosis, and its subject.

A diagnosis is a folder with `measure.py` and `show.py` (see `Measuring` and `Showing`), and a name
in DIAGNOSES. Its numbers are plain JSON, so that the file alone suffices for tables, sentences and
figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..stats import Interval
from ..text.chat import Chat
from ..text.roles import Row
from ..text.rows import PairedQuestion
from .models import REFERENCE, Models

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = dict[str, Any]
# In the order in which they are made and shown.
DIAGNOSES = (
    "logprob",
    "next_token",
    "loss_cosine",
    "gradient_cosine",
    "erosion",
    "shared_directions",
    "carriers",
    "perturbation",
    "persona_projection",
    "scope",
)


@dataclass(frozen=True)
class Subject:
    """What is diagnosed: models, and the texts to do it with.

    Attributes:
        inside: held-out paired questions of the training domain.
        outside: paired questions of other domains and on values.
        rows: the training rows.
        seed: of every random choice.
        batch_tokens: tokens of one batch, padding included.
        folder: where a diagnosis leaves files for other commands (directions); None = nowhere.
    """

    models: Models
    inside: list[PairedQuestion]
    outside: list[PairedQuestion]
    rows: list[Row] = field(default_factory=list)
    seed: int = 0
    batch_tokens: int = 4096
    folder: Path | None = None

    @property
    def chat(self) -> Chat:
        return self.models.chat

    @property
    def questions(self) -> list[PairedQuestion]:
        return [*self.inside, *self.outside]


@dataclass(frozen=True)
class Cost:
    """Cost of a diagnosis: tokens through forward and through forward-and-backward passes (over all
    models), and the most bytes kept next to the model."""

    forward: int
    backward: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Table:
    """Cells are texts, as shown; the first column names the row."""

    columns: list[str]
    rows: list[list[str]]


class Measuring(Protocol):
    """`measure.py` of a diagnosis. Knows no figures."""

    TITLE: str
    NEEDS_BASE: bool

    def cost(self, subject: Subject) -> Cost:
        """From the lengths of the texts alone; no model is opened."""

    def measure(self, subject: Subject) -> Numbers:
        """Looks at the models. Numbers of tuned models are by name: {"tuned": {name: ...}, ...}."""


class Showing(Protocol):
    """`show.py` of a diagnosis: from its numbers alone, as in diagnosis.json."""

    def say(self, numbers: Numbers) -> str:
        """One paragraph in plain words: what was found, and what the control says about it."""

    def table(self, numbers: Numbers) -> Table: ...

    def draw(self, numbers: Numbers) -> "Figure":
        """One figure with all tuned models. Called inside `plots.style()`."""


def measuring(name: str) -> Measuring:
    return cast(Measuring, import_module(f".{name}.measure", __package__))


def showing(name: str) -> Showing:
    return cast(Showing, import_module(f".{name}.show", __package__))


def shown(interval: dict[str, float] | Interval, digits: int = 2, sign: bool = True) -> str:
    """`+0.41 [+0.33, +0.50]`"""
    values = interval.to_dict() if isinstance(interval, Interval) else interval
    form = f"{'+' if sign else ''}.{digits}f"
    mean, low, high = (format(values[name], form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" if values["n"] > 1 else f"{mean} [one alone]"


def p_value(p: float) -> str:
    """`= 0.031`, `< 0.001`"""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def by_model(numbers: Numbers) -> Numbers:
    """The findings on the reference, then on each tuned model."""
    return {REFERENCE: numbers[REFERENCE], **numbers["tuned"]}


def clusters(questions: Sequence[PairedQuestion]) -> list[str]:
    """The name of each question: its texts are not independent of each other."""
    return [f"{q.domain}/{q.id}" for q in questions]
