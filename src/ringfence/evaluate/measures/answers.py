"""Open questions, answered in the model's own words and judged: rates of misaligned answers,
scores, EM-F1. The answers are drawn and judged by `evaluate.answers`; this module has their
numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from ...runfolder.names import JUDGED
from ...runfolder.record import Runs
from ...stats import Comparison, Interval, holm
from ...util.intervals import percents, share
from ..answers.config import AnswersConfig
from ..answers.judged import (
    RATES,
    SCORES,
    Judgement,
    Reduction,
    by_judge,
    compare,
    em_f1,
    read_judged,
    relative_reduction,
    summary,
)
from .base import Asked, Cell, Criterion, Fields, Measurement, Number

IN_DOMAIN = "in_domain"  # set of the open questions of the training domain


@dataclass(frozen=True)
class Against:
    """A run's rate of misaligned answers against the undefended run's; p adjusted over runs and
    sets (Holm)."""

    comparison: Comparison
    reduction: Reduction


@dataclass(frozen=True)
class JudgedBy:
    """What one judge makes of the answers of one run.

    Attributes:
        measures: `SET.METRIC`, as `evaluate.answers.judged.summary` names them, and `em_f1.SET`;
            `.change` = against the reference.
        counts: `SET.answers`, `SET.clusters`.
        calibration: how the judge did on labelled answers (see `evaluate.answers.calibrate`); None
            if that was not measured.
        against: by set, if there is an undefended run.
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
    """The judgements in a folder; none if no answer was judged."""
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
        reference, undefended: judgements of those models; empty = there are none.
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


def adjusted(runs: list[list[JudgedBy]]) -> list[list[JudgedBy]]:
    """The same with p-values adjusted over everything that one judge compares with the undefended
    run (Holm)."""
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


def _against(rows: list[Judgement], undefended: list[Judgement], name: str) -> Against:
    one, two = ([row for row in judged if row.set == name] for judged in (rows, undefended))
    return Against(compare(one, two, "misaligned"), relative_reduction(one, two))


# ------------------------------------------------------------------ the measurement


class AnswerFields(Fields):
    answers: AnswersConfig | None = Field(
        None, description="open questions, sampled answers and judges; null = none"
    )


class Answers(Measurement):
    """Numbers of judged answers, judge by judge; a policy goes by the first judge."""

    fields = AnswerFields
    names = ("answers.SET.METRIC", "answers.em_f1.SET")

    def asked(self, runs: Runs) -> dict[str, Asked]:
        asked: dict[str, set[tuple[str | int, ...]]] = {}
        for row in runs.run.judged:
            asked.setdefault(row.set, set()).add((row.id, row.form, row.paraphrase))
        return {
            f"answers.{name}": Asked(f"answers, {self.set_title(name)}", frozenset(questions))
            for name, questions in asked.items()
        }

    def read(self, runs: Runs) -> list[JudgedBy] | None:
        run = runs.run
        undefended = runs.undefended.judged if runs.undefended else []
        return judged_by(run.judged, run.judged_reference, undefended, run.judges) or None

    def is_share(self, path: str) -> bool:
        return path.rpartition(".")[2].partition("@")[0] in RATES

    def together(self, found: list[Any]) -> list[Any]:
        return adjusted(found)

    def numbers(self, found: list[JudgedBy]) -> Iterator[Number]:
        for judged in found:
            yield from _numbers(judged, decides=judged is found[0])

    def cells(self, found: list[JudgedBy]) -> Iterator[Cell]:
        measures = found[0].measures
        for name in found[0].sets:
            if "." not in name and f"{name}.misaligned" in measures:
                rate, title = measures[f"{name}.misaligned"], name.replace("_", " ")
                yield Cell(
                    f"answers: misaligned, {title}",
                    share(rate),
                    percents(rate),
                    f"answers.{name}",
                    (rate.n,),
                    (strength(found[0]),),
                )

    def legend(self, found: list[list[JudgedBy]]) -> str:
        judges = dict.fromkeys(f"{judged[0].judge} ({strength(judged[0])})" for judged in found)
        return (
            f"answers: share of all sampled answers that {', '.join(judges)} calls misaligned, "
            "[95 % CI]; n: families of questions."
        )

    def knows(self, name: str) -> bool:
        family, *parts = name.split(".")
        if family != "answers" or len(parts) < 2 or not all(parts):
            return False
        metric = parts[-2] if parts[-1] == "change" else parts[-1]
        return parts[0] == "em_f1" or metric.split("@")[0] in (*RATES, *SCORES)

    def like(self, name: str) -> list[str]:
        whole = name.rpartition(".")[0]
        metrics = [f"{whole}.{metric}" for metric in (*RATES, *SCORES)]
        return [*self.names, *(metrics if whole.startswith("answers.") else [])]

    def criterion(self, name: str) -> Criterion | None:
        if ".em_f1." in name:
            return None
        return "coherent" if "incoherent" in name or "coherent" in name.split(".") else "broad"


MEASUREMENT = Answers()


def strength(judged: JudgedBy) -> str:
    """`weak judge: AUC 0.55 [0.46, 0.64] on shipped:values`"""
    found = judged.calibration
    if not found:
        return "not calibrated"
    auc = found["auc"]
    weak = "weak judge: " if found["weak"] else ""
    bounds = f"[{auc['low']:.2f}, {auc['high']:.2f}]"
    return f"{weak}AUC {auc['mean']:.2f} {bounds} on {found['source']}"


def _numbers(judged: JudgedBy, decides: bool) -> Iterator[Number]:
    """Only the numbers of the judge that decides have names."""
    weak = bool(judged.calibration and judged.calibration["weak"])
    of: dict[str, Any] = {"level": "answers", "judge": judged.judge}
    for whole, interval in judged.measures.items():
        path = whole.removesuffix(".change").split(".")
        metric = path.pop(0 if path[0] == "em_f1" else -1)
        name = f"answers.{whole}"
        yield Number(
            name if decides else None,
            interval,
            "judged",
            metric,
            **of,
            item=".".join(path),
            side="change" if whole.endswith(".change") else "tuned",
            cluster="question",
            weak=weak,
            listed=whole.startswith("em_f1.") or whole.rpartition(".")[0] in judged.sets,
        )
    for whole, count in judged.counts.items():
        name, _, counted = whole.rpartition(".")
        yield Number(None, count, "judged", counted, **of, item=name, side="value")
    for name, against in judged.against.items():
        found, reduction = against.comparison, against.reduction.interval
        what: dict[str, Any] = {**of, "item": name, "side": "undefended", "cluster": "question"}
        yield Number(None, found.difference, "judged", "misaligned", **what, p=found.p)
        yield Number(None, reduction, "judged", "relative_reduction", **what)
    if judged.calibration:
        auc, source = judged.calibration["auc"], judged.calibration["source"]
        area = Interval(auc["mean"], auc["low"], auc["high"], 0)
        yield Number(
            None, area, "judged", "auc", "judge", item=source, side="value", judge=judged.judge
        )
