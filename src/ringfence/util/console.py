"""What a user sees during the work: one console, and one kind of progress bar with the time
left."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..processes import is_main

console = Console(stderr=True, quiet=not is_main())


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar; the yielded function advances it by a number of units."""
    columns = (
        TextColumn("{task.description:<34}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(description, total=total, completed=done)
        yield lambda units: bars.advance(task, units)


def fold(name: str, width: int) -> str:
    """The name over as many lines as it needs, broken after a space or a sign, within a word only
    if necessary."""
    lines = [""]
    for part in re.findall(r"[^\s_./,:-]*(?:[\s_./,:-]+|$)", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return "\n".join(line.rstrip() for line in lines)
