"""The sound control and the undefended run that a run is compared with, kept in its folder once
they are named.

So every command that decides on a run, or shows it, compares it with the same runs. Reads and
writes `compared.json`; knows no numbers.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, RingfenceError
from ..runfolder.names import COMPARED
from ..runfolder.shapes import read_compared
from ..util.console import console
from ..util.files import write_whole


@dataclass(frozen=True)
class Compared:
    """Folders of the sound control and of the undefended run; None = not compared."""

    control: Path | None = None
    undefended: Path | None = None


def compared(folder: Path, control: Path | None = None, undefended: Path | None = None) -> Compared:
    """The folders named here, else those named before and kept.

    Raises:
        DataError: a folder that was named before is gone.
    """
    file = folder / COMPARED
    kept = read_compared(file) if file.is_file() else {}
    found: dict[str, Path] = {}
    for role, named in (("control", control), ("undefended", undefended)):
        if named is not None:
            found[role] = named.resolve()
        elif kept.get(role) is not None:
            found[role] = (folder / kept[role]).resolve()
            if not found[role].is_dir():
                raise DataError(
                    f"{folder}: its {role} {found[role]}, named before and kept in {COMPARED}, is "
                    f"gone; name another with --{role}, or delete {COMPARED}"
                )
    return Compared(**found)


def keep_compared(folder: Path, control: Path | None, undefended: Path | None) -> None:
    """Keeps the folders named here in the folder of the run, for every later command."""
    found = compared(folder, control, undefended)
    paths = {"control": found.control, "undefended": found.undefended}
    record = {role: os.path.relpath(path, folder.resolve()) for role, path in paths.items() if path}
    if control or undefended:
        keep(folder / COMPARED, json.dumps(record, indent=1) + "\n")


def keep(file: Path, text: str) -> None:
    """Writes a record of a decision; if that fails, says so, and the decision still counts."""
    try:
        write_whole(file, text)
    except RingfenceError as error:
        console.print(f"not saved: {error}", markup=False, highlight=False, soft_wrap=True)
