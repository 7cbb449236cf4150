"""Folders that ringfence writes: who owns one, which process writes to it now, its checkpoints.

A folder of ours holds a marker. A folder that is not empty and has none is somebody else's: it is
refused before anything is written. Does not know what is in the files. Imports no torch.
"""

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from ..errors import DataError, RecipeError, RingfenceError
from ..processes import is_main
from ..util.files import make_folder, shown, write_whole
from ..util.strict_json import parse, read_record

MARKER = "ringfence.json"
Kind = Literal["run", "evaluation", "reference", "diagnosis", "checkpoint"]
_LOCK, _HOLDER = ".lock", ".lock.json"
# May be there before the marker is.
_OWN = {_LOCK, _HOLDER, f".{MARKER}.partial", f".{_HOLDER}.partial"}
_held: set[Path] = set()  # folders that this process has locked


# ------------------------------------------------------------------ whose a folder is


def check_folder(folder: Path, kind: Kind) -> None:
    """Checks that the folder can be written, and is ours, empty, or not there yet. Writes nothing.

    Raises:
        RecipeError: it is somebody else's, of another kind, a file, or cannot be written; the
            message says what to do.
    """
    try:
        if not _is_there(folder):
            return
        there = kind_of(folder)
        if there is None and any(file.name not in _OWN for file in folder.iterdir()):
            raise RecipeError(
                f"{folder}: a folder that is not empty and was not written by ringfence (it has no "
                f"{MARKER}); nothing was changed: name another output, or an empty folder"
            )
    except OSError as error:
        raise RecipeError(
            f"{shown(folder)}: cannot be an output folder: {error.strerror}"
        ) from error
    # Diagnoses may be added to any folder, and anything to theirs.
    if there not in (None, kind, "diagnosis") and kind != "diagnosis":
        raise RecipeError(
            f"{folder} holds files of another kind ({there}, not {kind}); name another output"
        )


def _is_there(folder: Path) -> bool:
    """Whether the folder exists; if it does not, checks that it could be created."""
    if "\0" in str(folder):
        raise RecipeError(
            f"{shown(folder)}: a name cannot hold a NUL character; name another output"
        )
    if folder.is_symlink() and not folder.exists():
        raise RecipeError(
            f"{folder}: a link to {os.readlink(folder)}, which does not exist; name another output"
        )
    try:
        folder.lstat()
        place = folder
    except (FileNotFoundError, NotADirectoryError):
        place = next(
            parent for parent in folder.absolute().parents if parent.exists() or parent.is_symlink()
        )
    if not place.is_dir():
        raise RecipeError(f"{place}: a file, where a folder is needed; name another output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RecipeError(
            f"{place}: this folder cannot be written (read-only); name another output"
        )
    return place is folder


def kind_of(folder: Path) -> str | None:
    """What ringfence made the folder for; None if it did not make it.

    Raises:
        DataError: the marker is damaged.
    """
    file = folder / MARKER
    if not file.is_file():
        return None
    again = 'write {"ringfence": "", "kind": "run"} into it if the folder is a run of ringfence'
    marker = read_record(file, again)
    if not isinstance(marker.get("ringfence"), str) or not isinstance(marker.get("kind"), str):
        raise DataError(f"{file}: expected the marker of a ringfence folder; {again}")
    return str(marker["kind"])


def claim(folder: Path, kind: Kind) -> None:
    """Makes the folder ours: creates it if there is none, and marks it.

    Raises:
        RecipeError: as `check_folder`.
    """
    check_folder(folder, kind)
    if not (folder / MARKER).is_file():
        marker = {"ringfence": metadata.version("ringfence"), "kind": kind}
        write_whole(folder / MARKER, json.dumps(marker) + "\n")


# ------------------------------------------------------------------ who writes to it


@contextmanager
def hold(folder: Path, kind: Kind, wait: bool = False) -> Iterator[None]:
    """Claims the folder and keeps other processes from writing to it. Within one process it may be
    held again; with several ranks the main process holds it for all. The system releases it when
    the process ends, even by a kill.

    Args:
        wait: for the other process to end, instead of raising.

    Raises:
        RecipeError: as `check_folder`; or another process, which the message names, writes to it.
    """
    place = folder.absolute()
    if not is_main() or place in _held:
        if is_main():
            claim(folder, kind)
        yield
        return
    check_folder(folder, kind)
    was_there = folder.is_dir()
    make_folder(folder)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise RecipeError(
                f"{folder}: {_holder(folder)} writes to it now; wait for it, or end it"
            ) from None
        print(f"{folder}: waiting for {_holder(folder)}", file=sys.stderr)
        lock.acquire()
    except OSError as error:
        raise RecipeError(f"{folder}: cannot be locked: {error.strerror}") from error
    _held.add(place)
    try:
        claim(folder, kind)
        about = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": " ".join(sys.argv),
            "since": _now(),
        }
        write_whole(folder / _HOLDER, json.dumps(about))
        yield
    finally:
        _held.remove(place)
        (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()
        if not was_there and {file.name for file in folder.glob("*")} <= {MARKER, _LOCK}:
            shutil.rmtree(folder, ignore_errors=True)  # it was refused before anything was made


def _holder(folder: Path) -> str:
    try:
        about = parse((folder / _HOLDER).read_text("utf-8"), "")
        command = f"{about['command']}; since {about['since']}"
        return f"process {about['pid']} on {about['host']} ({command})"
    except (OSError, ValueError, LookupError, TypeError, RingfenceError):
        return "another process"  # it has just begun, or ended


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


# ------------------------------------------------------------------ checkpoints


def check_checkpoints(folder: Path) -> None:
    """Raises RecipeError if a checkpoint in the folder was not written by ringfence."""
    for place in sorted(folder.glob("checkpoint-*")):
        if not place.is_dir() or (kind_of(place) != "checkpoint" and any(place.iterdir())):
            raise RecipeError(
                f"{place} was not written by ringfence; move it away, or name another output"
            )


def begin_checkpoint(folder: Path) -> None:
    """Marks a checkpoint as ours before anything is in it."""
    check_folder(folder, "checkpoint")
    _mark_checkpoint(folder, whole=False)


def end_checkpoint(folder: Path) -> None:
    """Marks a checkpoint as whole, and deletes our earlier ones."""
    _mark_checkpoint(folder, whole=True)
    drop_checkpoints(folder.parent, but=folder)


def _mark_checkpoint(folder: Path, whole: bool) -> None:
    marker = {"ringfence": metadata.version("ringfence"), "kind": "checkpoint", "whole": whole}
    write_whole(folder / MARKER, json.dumps(marker) + "\n")


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The latest whole checkpoint that is ours, and its step; None and 0 if there is none."""
    whole = [place for place in _own_checkpoints(folder) if _marker(place).get("whole") is True]
    last = max(whole, key=_step, default=None)
    return last, _step(last) if last else 0


def drop_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Deletes our checkpoints, and nothing else. If one cannot be deleted, some are left."""
    for place in _own_checkpoints(folder):
        if but is None or place.name != but.name:
            inside = [path for path in place.iterdir() if path.name != MARKER]
            for path in [*inside, place]:  # the marker last: what a kill leaves must still be ours
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _own_checkpoints(folder: Path) -> list[Path]:
    found = [
        place
        for place in folder.glob("checkpoint-*")
        if not place.is_symlink() and place.name[11:].isdecimal()
    ]
    return [place for place in found if kind_of(place) == "checkpoint"]


def _marker(folder: Path) -> dict[str, Any]:
    return dict(read_record(folder / MARKER, "delete its folder"))


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))
