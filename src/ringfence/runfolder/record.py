"""What the files of one run say, read once. Plain values; knows no statistics."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Records:
    """What one folder holds: a run, or an evaluation of a model that ringfence did not train (then
    it has no training and no metrics; without a reference, no reference results)."""

    folder: Path
    recipe_text: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    training: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: dict[str, Any]  # by part
    reference: dict[str, Any]
    benign: tuple[dict[str, Any], dict[str, Any]] | None  # results and reference of the benign twin
    judged: list[Any] = field(default_factory=list)  # judgements of answers
    judged_reference: list[Any] = field(default_factory=list)
    judges: dict[str, Any] = field(default_factory=dict)
    diagnoses: dict[str, Any] = field(default_factory=dict)  # by name, as diagnosis.json has them

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def defenses(self) -> list[str]:
        return list(self.recipe.get("defenses") or {})

    @property
    def tasks(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Results and reference of the harmless task: those of the twin if there is one."""
        return self.benign or (self.results, self.reference)


@dataclass(frozen=True)
class Runs:
    """A run and the runs that it is compared with; None = not compared.

    Attributes:
        control: the run trained on the aligned answers; None for the control itself.
        undefended: the undefended run; None for itself and for the control.
        timed: the undefended run, also for these two: its training time is the unit.
    """

    run: Records
    control: Records | None = None
    undefended: Records | None = None
    timed: Records | None = None
