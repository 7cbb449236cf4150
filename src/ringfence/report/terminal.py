"""Runs side by side in the terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..evaluate.measures.base import Cell
from ..util.console import fold
from .notes import OTHER, legends, other_questions, seeds_note
from .summary import Summary, asked_otherwise, titles

# Widths in characters: of a label and a run's name at most, of a cell at least.
_LABEL, _NAME, _CELL = 28, 22, 13


def print_table(rows: list[Summary], console: Console) -> None:
    """Prints the runs side by side, one column each, in as many tables as the width needs."""
    columns = [{cell.title: cell for cell in row.cells if cell.value} for row in rows]
    others = asked_otherwise(rows)
    shown = [title for title in titles(rows) if any(title in column for column in columns)]
    names = [fold(row.name, _NAME) for row in rows]
    for start, end in _beside(names, console.width - _LABEL - 1):
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1))
        table.add_column("", max_width=_LABEL)
        for name in names[start:end]:
            table.add_column(escape(name), justify="right", no_wrap=True)
        for title in shown:
            label = "\n".join(part for part in (fold(title, _LABEL), _n(columns, title)) if part)
            beside = list(zip(columns, others))[start:end]
            cells = [_text(column.get(title), other) for column, other in beside]
            table.add_row(escape(label), *map(escape, cells))
        console.print(table)
    console.print(_legend(rows), markup=False, highlight=False)


def _beside(names: list[str], width: int) -> list[tuple[int, int]]:
    """The first run of each table and the one after its last; each table has at least one run."""
    parts, start, taken = [], 0, 0
    for place, name in enumerate(names):
        own = max(_CELL, *map(len, name.split("\n"))) + 2
        if place > start and taken + own > width:
            parts.append((start, place))
            start, taken = place, 0
        taken += own
    return [*parts, (start, len(names))]


def _text(cell: Cell | None, other: dict[str, str]) -> str:
    """A number with its interval under it, marked if it was measured on other questions."""
    if cell is None:
        return ""
    value = f"{cell.value}{OTHER if cell.asked in other else ''}"
    return "\n".join(part for part in (value, cell.bounds.replace(", ", ",")) if part)


def _n(columns: list[dict[str, Cell]], title: str) -> str:
    """`n = 48`; every value if the runs differ."""
    counts = [column[title].n for column in columns if title in column]
    found = dict.fromkeys(", ".join(map(str, n)) for n in counts if n)
    return fold(f"n = {' or '.join(found)}", _LABEL) if found else ""


def _legend(rows: list[Summary]) -> str:
    controls = [row.name for row in rows if row.is_control]
    lines = [
        *legends(rows),
        *(f"The column of the control ({name}) is its shift." for name in controls),
        "n: questions.",
        seeds_note(rows),
        *other_questions(rows),
    ]
    return "\n".join(lines)
