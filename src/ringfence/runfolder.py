"""The folder of a run: how its files are written. Imports no torch."""

import os
from pathlib import Path

from .errors import RingfenceError


def write_whole(file: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all, also after a kill or on a full disk.

    Raises:
        RingfenceError: it cannot be written, and why.
    """
    scratch = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, "utf-8")
        os.replace(scratch, file)
    except OSError as error:
        raise RingfenceError(f"{file}: cannot be written: {error.strerror}") from error
