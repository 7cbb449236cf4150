"""Judged answers of runs, for the report. Reads files only; never imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..evaluate.answers.judged import (
    Judgement,
    Reduction,
    by_judge,
    compare,
    em_f1,
    read_judged,
    relative_reduction,
    summary,
)
from ..runfolder.names import JUDGED
from ..stats import Comparison, Interval, holm

IN_DOMAIN = "in_domain"  # set of the open questions of the training domain


@dataclass(frozen=True)
class Against:
    """A run's rate of misaligned answers against the undefended run's; p adjusted over runs and sets (Holm)."""

    comparison: Comparison
    reduction: Reduction


@dataclass(frozen=True)
class JudgedBy:
    """What one judge makes of the answers of one run.

    Attributes:
        measures: `SET.METRIC`, as `evaluate.judged.summary` names them, and `em_f1.SET`; `.change` = against the
            reference.
        counts: `SET.answers`, `SET.clusters`.
        calibration: how the judge did on labelled answers (see `evaluate.calibrate`); None where it was not measured.
        against: by set, where there is an undefended run.
    """

    judge: str
    prompt: str
    measures: dict[str, Interval]
    counts: dict[str, int]
    calibration: dict[str, Any] | None
    against: dict[str, Against]

    @property
    def sets(self) -> list[str]:
        """Names of the sets of questions; after them, those of their forms (`general.json`)."""
        names = [
            name.removesuffix(".clusters") for name in self.counts if name.endswith(".clusters")
        ]
        return sorted(names, key=lambda name: "." in name)


def judgements_in(folder: Path) -> list[Judgement]:
    """The judgements in a folder; none where no answer was judged."""
    file = folder / JUDGED
    return read_judged(file) if file.is_file() else []


def judged_by(
    run: Sequence[Judgement],
    reference: Sequence[Judgement],
    undefended: Sequence[Judgement],
    judges: dict[str, Any],
) -> list[JudgedBy]:
    """The numbers of one run, judge by judge.

    Args:
        reference, undefended: judgements of those models; empty = there is none.
        judges: judges.json of the run.

    Raises:
        DataError: the models were not asked the same questions.
    """
    calibrations = {found["judge"]: found for found in judges.get("calibrations", [])}
    others, bases = by_judge(reference), by_judge(undefended)
    found = []
    for judge, rows in by_judge(run).items():
        names = summary(rows, others.get(judge))
        measures = {name: value for name, value in names.items() if isinstance(value, Interval)}
        sets = list(dict.fromkeys(row.set for row in rows))
        inside = [row for row in rows if row.set == IN_DOMAIN]
        for name in sets if inside and f"{IN_DOMAIN}.aligned" in measures else []:
            if name != IN_DOMAIN and f"{name}.aligned" in measures:
                measures[f"em_f1.{name}"] = em_f1(inside, [row for row in rows if row.set == name])
        asked = {row.set for row in bases.get(judge, [])}
        against = {name: _against(rows, bases[judge], name) for name in sets if name in asked}
        counts = {name: value for name, value in names.items() if isinstance(value, int)}
        found.append(
            JudgedBy(judge, names["prompt"], measures, counts, calibrations.get(judge), against)
        )
    return found


def _against(rows: list[Judgement], undefended: list[Judgement], name: str) -> Against:
    one, two = ([row for row in judged if row.set == name] for judged in (rows, undefended))
    return Against(compare(one, two, "misaligned"), relative_reduction(one, two))


def adjusted(runs: list[list[JudgedBy]]) -> list[list[JudgedBy]]:
    """The same with p-values adjusted over everything that one judge compares with the undefended run (Holm)."""
    for judge in dict.fromkeys(found.judge for run in runs for found in run):
        places = [
            (r, j, name)
            for r, run in enumerate(runs)
            for j, found in enumerate(run)
            for name in (found.against if found.judge == judge else ())
        ]
        p_values = holm([runs[r][j].against[name].comparison.p for r, j, name in places])
        for (r, j, name), p in zip(places, p_values):
            now = runs[r][j].against[name]
            changed = replace(now, comparison=replace(now.comparison, p=p))
            runs[r][j] = replace(runs[r][j], against={**runs[r][j].against, name: changed})
    return runs
