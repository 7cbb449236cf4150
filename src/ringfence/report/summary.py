"""Turns the records of a run, of its control and of its undefended run into numbers: a loop over
the measurements. Never imports torch."""

from dataclasses import dataclass, field
from typing import Any

from ..evaluate.config import MEASUREMENTS
from ..evaluate.measures.base import Asked, Cell, Number
from ..evaluate.measures.pairs import Paired, PairedSets
from ..runfolder.record import Records, Runs


@dataclass(frozen=True)
class Summary:
    """What was measured of one run, or of several runs of one recipe that differ in their seed.

    Attributes:
        found: by measurement (`evaluate.config.NAMES`), what its `read` returns.
        control, undefended: names of the runs that it is compared with.
        seeds: the number of runs; `seed_values`: their seeds, where they were trained here.
        asked: what each set was measured on.
    """

    name: str
    is_control: bool
    defenses: list[str]
    found: dict[str, Any]
    control: str | None = None
    undefended: str | None = None
    seeds: int = 1
    seed_values: tuple[int, ...] = ()
    asked: dict[str, Asked] = field(default_factory=dict)

    @property
    def pairs(self) -> PairedSets:
        """Shifts, effects and margins of the paired questions."""
        return self.found.get("pairs") or PairedSets()

    @property
    def sets(self) -> dict[str, Paired]:
        """Shifts and effects by set of paired questions."""
        return self.pairs.sets

    @property
    def all_numbers(self) -> list[Number]:
        """Every number, including those that only the export has."""
        return [
            number
            for name, found in self.found.items()
            for number in MEASUREMENTS[name].numbers(found)
        ]

    @property
    def numbers(self) -> dict[str, Number]:
        """The numbers by the name that a policy uses (docs/gate.md)."""
        return {number.name: number for number in self.all_numbers if number.name}

    @property
    def cells(self) -> list[Cell]:
        """What tables show, in their order."""
        return [
            cell for name, found in self.found.items() for cell in MEASUREMENTS[name].cells(found)
        ]


def summarise(
    records: Records, control: Records | None = None, undefended: Records | None = None
) -> Summary:
    """The numbers of one run.

    Args:
        control: the run trained on the aligned answers; with it, effects are given.
        undefended: the undefended run, with which time and judged answers are compared.
    """
    is_control = control is not None and records.folder == control.folder
    is_undefended = undefended is not None and records.folder == undefended.folder
    runs = Runs(
        run=records,
        control=None if is_control else control,
        undefended=None if is_control or is_undefended else undefended,
        timed=undefended,
    )
    found = {name: measurement.read(runs) for name, measurement in MEASUREMENTS.items()}
    seed = records.environment.get("seed") if records.training else None
    return Summary(
        name=records.name,
        is_control=is_control,
        defenses=records.defenses,
        found={name: value for name, value in found.items() if value is not None},
        control=runs.control.name if runs.control else None,
        undefended=runs.undefended.name if runs.undefended else None,
        seed_values=() if seed is None else (seed,),
        asked=asked_of(records),
    )


def asked_of(records: Records) -> dict[str, Asked]:
    """What each set of a run was measured on."""
    runs = Runs(records)
    return {
        name: items
        for measurement in MEASUREMENTS.values()
        for name, items in measurement.asked(runs).items()
    }


def asked_otherwise(rows: list[Summary]) -> list[dict[str, str]]:
    """For each run, the sets measured on other items than in the first run that has the set, and
    the name of that run."""
    first: dict[str, Summary] = {}
    for row in rows:
        for name in row.asked:
            first.setdefault(name, row)
    return [
        {
            name: first[name].name
            for name, items in row.asked.items()
            if items != first[name].asked[name]
        }
        for row in rows
    ]


def titles(rows: list[Summary]) -> list[str]:
    """Titles of the cells of all runs, in the order of the measurements."""
    return list(
        dict.fromkeys(
            cell.title
            for name, measurement in MEASUREMENTS.items()
            for row in rows
            if name in row.found
            for cell in measurement.cells(row.found[name])
        )
    )


def has_effects(rows: list[Summary]) -> bool:
    """Whether there is a sound control, so that runs have effects and not shifts alone."""
    return any(paired.effect for row in rows for paired in row.sets.values())


def find_undefended(runs: list[Records]) -> Records | None:
    """The first trained run without defenses."""
    return next((run for run in runs if run.training and not run.defenses), None)
