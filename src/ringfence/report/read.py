"""Reads run folders into rows of numbers, each next to its control and its undefended run."""

from dataclasses import replace
from pathlib import Path

from ..evaluate.config import MEASUREMENTS
from ..runfolder.record import Records
from .compared import compared
from .records import read_run
from .seeds import by_recipe, over_runs
from .summary import Summary, find_undefended, summarise


def read_rows(
    folders: list[Path], control: Path | None = None, undefended: Path | None = None
) -> tuple[list[Records], list[Summary]]:
    """Numbers of run folders, in the order given, and the records behind them.

    Runs of one recipe that differ only in their seed are one row, with the records of the first.

    Args:
        control, undefended: what the runs are compared with; default: what was named for each run
            before, else, as the undefended run, one of these runs.
    """
    records = [read_run(folder) for folder in folders]
    known: dict[Path, Records] = {run.folder: run for run in records}

    def read(folder: Path | None) -> Records | None:
        if folder is not None and folder not in known:
            known[folder] = read_run(folder)
        return known[folder] if folder is not None else None

    before = [compared(run.folder, control, undefended) for run in records]
    controls = {found.control for found in before}
    plain = find_undefended([run for run in records if run.folder not in controls])
    single: dict[Path, Summary] = {}
    for run, found in zip(records, before):
        own = run.folder if run.folder in controls else found.control
        single[run.folder] = summarise(run, read(own), read(found.undefended) or plain)
    groups = [[run] for run in records if run.folder in controls]
    groups += by_recipe([run for run in records if run.folder not in controls])
    groups.sort(key=lambda group: records.index(group[0]))
    rows = [over_runs([single[run.folder] for run in group]) for group in groups]
    return [group[0] for group in groups], _together(rows)


def _together(rows: list[Summary]) -> list[Summary]:
    """Corrected for the number of runs: p-values of one table are adjusted together."""
    for name, measurement in MEASUREMENTS.items():
        having = [row for row in rows if name in row.found]
        corrected = iter(measurement.together([row.found[name] for row in having]))
        rows = [
            replace(row, found=row.found | {name: next(corrected)}) if name in row.found else row
            for row in rows
        ]
    return rows
