"""All numbers of runs as one long table, in JSON or CSV. Reads records only, never imports torch.

Columns keep their names and order; a cell that does not apply is empty (null in JSON).

| column | holds |
|---|---|
| `run`, `folder` | name and folder of the run |
| `measure` | margin, share_above_zero, perplexity, perplexity_ratio, exact_match, shown, loss, \
open, seconds, time_ratio, memory_gib; for judged answers their metrics, answers, em_f1, \
relative_reduction, auc |
| `level` | what is measured together: set, domain, condition, scope, tier, behaviour, answers, \
judge or run |
| `name` | which one: out_of_domain, car_care, lead_in, opswap_tier1, general ... |
| `kind` | for margins effect, shift or tuned; otherwise tuned, reference, change (against the \
reference), undefended (against the undefended run), or value |
| `mean`, `low`, `high` | the value and its 95 % interval |
| `n`, `cluster` | how many units the interval is over, and which: question, domain, answer, \
item or row |
| `p` | p-value of a difference, adjusted over the runs of the table (Holm) |
| `judge` | the judge |
"""

import csv
import io
import json
from pathlib import Path
from typing import Any, Literal

from ..evaluate.measures.base import Number
from ..stats import Interval, finite
from .gate import decide, load_policy
from .read import read_rows
from .summary import Summary

FORMAT = "ringfence-results-1"

COLUMNS = [
    *("run", "folder", "measure", "level", "name", "kind"),
    *("mean", "low", "high", "n", "cluster", "p", "judge"),
]


def export_runs(
    folders: list[Path],
    form: Literal["json", "csv"] = "csv",
    control: Path | None = None,
    undefended: Path | None = None,
) -> str:
    """The table of runs, as text: a JSON object with its lines under `results`, or a CSV with a
    header.

    Args:
        control: the run trained on the aligned answers; with it, effects are given next to shifts.
        undefended: the undefended run. Default for both: what the gate or the card was given.

    Raises:
        DataError: a folder holds no run, or one that is not measured.
    """
    _, rows = read_rows(folders, control, undefended)
    lines = [
        {"run": row.name, "folder": str(folder), **finite(line(number))}
        for folder, row in zip(folders, rows)
        for number in row.all_numbers
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
    """Decisions by the shipped policy, as `ringfence gate` makes them; none for a control."""
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
    """Puts an apostrophe before text that a spreadsheet would take for a formula."""
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if is_formula else cell


def line(number: Number) -> dict[str, Any]:
    """A number as a line of the table, without its run."""
    mean: dict[str, Any] = {"mean": number.value}
    if isinstance(number.value, Interval):
        mean = number.value.to_dict()
    found = {
        "measure": number.measure,
        "level": number.level,
        "name": number.item,
        "kind": number.side,
        **mean,
        "cluster": number.cluster,
        "p": number.p,
        "judge": number.judge,
    }
    found["n"] = found.get("n") or None  # of labelled answers they are not known
    return {column: found.get(column) for column in COLUMNS[2:]}
