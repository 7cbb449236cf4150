"""All numbers of runs as one long table, in JSON or CSV. Reads records only, never imports torch.

Columns, which stay as they are; empty (null in JSON) where there is nothing to say:

| column | holds |
|---|---|
| `run`, `folder` | name and folder of the run |
| `measure` | margin, share_above_zero, perplexity, perplexity_ratio, exact_match, shown, loss, seconds, time_ratio, \
memory_gib; of judged answers their metrics, answers, em_f1, relative_reduction, auc |
| `level` | what is measured together: set, domain, condition, tier, behaviour, answers, judge or run |
| `name` | which one: out_of_domain, car_care, lead_in, opswap_tier1, general ... |
| `kind` | of margins effect, shift or tuned; else tuned, reference, change (against the reference), undefended \
(against the undefended run), or value |
| `mean`, `low`, `high` | the value and its 95 % interval |
| `n`, `cluster` | how many were drawn for the interval, and what: question, domain, answer, item or row |
| `p` | p-value of a difference, adjusted over the runs of the table (Holm) |
| `judge` | who judged |
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..stats import Interval, finite
from .answers import JudgedBy
from .gate import decide, load_policy
from .read import read_rows
from .summary import Paired, Summary

FORMAT = "ringfence-results-1"


@dataclass(frozen=True)
class Line:
    """A line of the table, without the run; the columns are those of the table above."""

    measure: str
    level: str
    name: str
    kind: str
    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    cluster: str | None = None
    p: float | None = None
    judge: str | None = None


COLUMNS = ["run", "folder", *Line.__dataclass_fields__]


def export_runs(
    folders: list[Path],
    form: Literal["json", "csv"] = "csv",
    control: Path | None = None,
    undefended: Path | None = None,
) -> str:
    """The table of runs, as text: a JSON object with its lines under `results`, or a CSV with a header.

    Args:
        control: the run trained on sound answers; with it, effects are given beside shifts.
        undefended: the undefended run. Default of both: what the gate or the card was given.

    Raises:
        DataError: a folder holds no run, or one that is not measured.
    """
    _, rows = read_rows(folders, control, undefended)
    lines = [
        {"run": row.name, "folder": str(folder), **finite(asdict(line))}
        for folder, row in zip(folders, rows)
        for line in table(row)
    ]
    if form == "json":
        named = str(control) if control else None
        whole = {
            "format": FORMAT,
            "control": named,
            "decisions": _decisions(folders, rows),
            "results": lines,
        }
        return json.dumps(whole, indent=1, allow_nan=False) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _as_text(cell) for name, cell in line.items()} for line in lines)
    return text.getvalue()


def _decisions(folders: list[Path], rows: list[Summary]) -> list[dict[str, Any]]:
    """By the policy that ships, as `ringfence gate` decides; none of a control."""
    rules = load_policy()
    return [
        {
            "run": row.name,
            "folder": str(folder),
            "decision": decision.word,
            "compared_with": decision.against,
        }
        for folder, row in zip(folders, rows)
        if not row.is_control
        for decision in [decide(row, rules)]
    ]


def _as_text(cell: Any) -> Any:
    """A text that a spreadsheet would take for a formula gets an apostrophe before it; numbers stay numbers."""
    return (
        f"'{cell}"
        if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
        else cell
    )


def table(row: Summary) -> Iterator[Line]:
    """Every number of one run."""
    for name, margin in row.margins.items():
        yield _line("margin", "set", name, "tuned", margin, "question")
    for level, group in (("set", row.sets), ("domain", row.domains), ("condition", row.conditions)):
        for name, paired in group.items():
            yield from _paired(paired, level, name)
    yield from _fluency_and_cost(row)
    yield from _tasks(row)
    for judged in row.judged:
        yield from _judged(judged)


def _paired(paired: Paired, level: str, name: str) -> Iterator[Line]:
    for kind, by_question, by_domain in (
        ("shift", paired.shift, paired.shift_by_domain),
        ("effect", paired.effect, paired.effect_by_domain),
    ):
        if by_question:
            yield _line("margin", level, name, kind, by_question, "question")
        if by_domain and level != "domain":
            yield _line("margin", level, name, kind, by_domain, "domain")
    yield Line("share_above_zero", level, name, "tuned", paired.share)
    yield Line("share_above_zero", level, name, "reference", paired.reference_share)


def _fluency_and_cost(row: Summary) -> Iterator[Line]:
    if row.perplexity is not None:
        yield Line("perplexity", "run", "fluency", "tuned", row.perplexity)
    if row.perplexity_ratio:
        yield _line("perplexity_ratio", "run", "fluency", "value", row.perplexity_ratio, "answer")
    if row.time_ratio is not None:
        yield Line("time_ratio", "run", "training", "value", row.time_ratio)
    if row.seconds:  # none where the model was not trained here
        yield Line("seconds", "run", "training", "value", row.seconds)
        yield Line("memory_gib", "run", "training", "value", row.memory_gib)


def _tasks(row: Summary) -> Iterator[Line]:
    for name, interval in row.opswap.items():
        yield _line("exact_match", "tier", name, "tuned", interval, "item")
    for name, interval in row.opswap_change.items():
        yield _line("exact_match", "tier", name, "undefended", interval, "item")
    for name, share in row.opswap_reference.items():
        yield Line("exact_match", "tier", name, "reference", share)
    for kind, behaviours in (("tuned", row.behaviours), ("reference", row.behaviours_reference)):
        for name, shown in behaviours.items():
            for topic, interval in shown.items():
                yield _line("shown", "behaviour", f"{name}.{topic}", kind, interval, "item")
    for name, interval in row.held_out.items():
        measure = "exact_match" if name == "exact" else "loss"
        yield _line(
            measure, "run", "held_out", "change" if name == "change" else "tuned", interval, "row"
        )


def _judged(judged: JudgedBy) -> Iterator[Line]:
    for whole, interval in judged.measures.items():
        path = whole.removesuffix(".change").split(".")
        metric = path.pop(0 if path[0] == "em_f1" else -1)
        kind = "change" if whole.endswith(".change") else "tuned"
        yield _line(
            metric, "answers", ".".join(path), kind, interval, "question", judge=judged.judge
        )
    for whole, count in judged.counts.items():
        name, _, what = whole.rpartition(".")
        yield Line(what, "answers", name, "value", count, judge=judged.judge)
    for name, against in judged.against.items():
        found = against.comparison
        yield _line(
            "misaligned",
            "answers",
            name,
            "undefended",
            found.difference,
            "question",
            found.p,
            judged.judge,
        )
        reduction = against.reduction.interval
        yield _line(
            "relative_reduction",
            "answers",
            name,
            "undefended",
            reduction,
            "question",
            judge=judged.judge,
        )
    if judged.calibration:
        auc = judged.calibration["auc"]
        source = judged.calibration["source"]
        yield Line(
            "auc",
            "judge",
            source,
            "value",
            auc["mean"],
            auc["low"],
            auc["high"],
            judge=judged.judge,
        )


def _line(
    measure: str,
    level: str,
    name: str,
    kind: str,
    interval: Interval,
    cluster: str,
    p: float | None = None,
    judge: str | None = None,
) -> Line:
    numbers: dict[str, Any] = interval.to_dict()
    return Line(measure, level, name, kind, **numbers, cluster=cluster, p=p, judge=judge)
