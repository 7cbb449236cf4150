"""Writes files whole or not at all; whatever a disk or a name forbids becomes one sentence."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RecipeError, RingfenceError, first_line

_FULL = 16 * 2**20  # bytes: a disk with less room is full


def shown(path: Path) -> str:
    """A path for a message: without control characters, and of a sane length."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))
    return text if len(text) <= 200 else f"{text[:100]}...{text[-40:]}"


def write_whole(file: Path, content: str | bytes, is_shared: bool = False) -> None:
    """Writes a file whole or not at all, even after a kill or on a full disk.

    Args:
        is_shared: several processes may write it at once, as in a cache; the last one's content
            stays.

    Raises:
        RingfenceError: it cannot be written, and why.
    """
    make_folder(file.parent)
    # A sole writer always takes the same name, so leftovers of kills do not pile up.
    writer = f".{os.getpid()}-{threading.get_ident()}" if is_shared else ""
    scratch = file.with_name(f".{file.name}{writer}.partial")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(scratch, file)
    except OSError as error:
        _drop(scratch)
        raise RingfenceError(f"{shown(file)}: cannot be written: {error.strerror}") from error


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RingfenceError(f"{shown(folder)}: cannot be made: {error.strerror}") from error


def _drop(scratch: Path) -> None:
    try:
        scratch.unlink(missing_ok=True)
    except OSError:  # the message about the file itself matters more
        return


def check_new(file: Path) -> None:
    """Checks that a file that the user named can be written without any file being lost. Writes
    nothing.

    Raises:
        RecipeError: it exists already, or its folder does not or cannot be written.
    """
    try:
        if "\0" in str(file):
            raise RecipeError(
                f"{shown(file)}: a name cannot hold a NUL character; name another file"
            )
        if file.is_dir():
            raise RecipeError(f"{file}: a folder; name a file in it")
        if os.path.lexists(file):
            raise RecipeError(f"{file}: exists already; name another file, or delete it")
        file.lstat()
    except FileNotFoundError:
        if not file.parent.is_dir():
            raise RecipeError(f"{shown(file)}: no folder {shown(file.parent)}") from None
        if not os.access(file.parent, os.W_OK | os.X_OK):
            raise RecipeError(
                f"{file}: its folder cannot be written (read-only); name another file"
            ) from None
    except OSError as error:
        raise RecipeError(f"{shown(file)}: cannot be written: {error.strerror}") from error


@contextmanager
def told_if_full(folder: Path) -> Iterator[None]:
    """For libraries that write by themselves: their errors on a full disk become one sentence.

    Raises:
        RingfenceError: they could not write.
    """
    try:
        yield
    except RingfenceError:
        raise
    except Exception as error:
        full = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free < _FULL
        if not full and not isinstance(error, OSError) and "No space left" not in str(error):
            raise
        no_room = "no room left on the disk; make room, and the same command resumes"
        why = no_room if full else first_line(error)
        raise RingfenceError(f"{folder}: cannot be written: {why}") from error
