"""A table that grows line by line and survives a killed run: JSON lines below a header that says
what they belong to.

Does not know what is in the lines.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..errors import DataError
from .files import write_whole
from .strict_json import check_shape, parse, whole_lines

Line = dict[str, Any]


class _Header(BaseModel):
    key: dict[str, Any]


def open_journal(
    file: Path, kind: str, key: dict[str, Any], about: dict[str, Any], shape: Any = dict[str, Any]
) -> list[Line]:
    """The whole lines of a table, which is made if there is none. An incomplete last line is cut
    off.

    Args:
        kind: what kind of table it is.
        key: what its lines depend on; a table with lines of another key is refused.
        about: further entries of the header, for readers.
        shape: a line's type, for pydantic.

    Raises:
        DataError: the file is of another kind or key, or a line is damaged.
    """
    first = json.dumps({"table": kind, "key": key, **about}) + "\n"
    text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
    if first.startswith(text):
        write_whole(file, first)
        return []
    whole = whole_lines(text)
    header, lines = split_table(whole, file, kind, shape)
    if not lines:
        write_whole(file, first)
        return []
    for part, here in key.items():
        there = header["key"].get(part) if isinstance(header.get("key"), dict) else None
        if there != here:
            raise DataError(
                f"{file} was made with {part} {there!r}, not with {here!r} (names or "
                "fingerprints); name another output, or delete the file"
            )
    if whole != text:
        os.truncate(file, len(whole.encode()))
    return lines


def split_table(
    text: str, file: Path, kind: str, shape: Any = dict[str, Any]
) -> tuple[Line, list[Line]]:
    """Header and lines of a table's text; `shape` is the type of a line, for pydantic.

    Raises:
        DataError: it is not a table of this kind, or a line is damaged.
    """
    parsed: list[Line] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            parsed.append(parse(line, f"{file}:{number}"))
        except DataError:
            if number > 1:
                raise
            break
        if number > 1 and not isinstance(parsed[-1], dict):
            raise DataError(
                f"{file}:{number}: expected a line of a table of {kind}, found {line[:60]!r}"
            )
    if not parsed or not isinstance(parsed[0], dict) or parsed[0].get("table") != kind:
        raise DataError(
            f"{file}: expected a table of {kind} (its first line says so), found something else"
        )
    for number, value in enumerate(parsed[1:], 2):
        check_shape(
            shape, value, f"{file}:{number}", "delete the line, and the same command recreates it"
        )
    check_shape(
        _Header, parsed[0], f"{file}:1", "delete the file, and the same command recreates it"
    )
    return parsed[0], parsed[1:]


def append(file: Path, lines: Iterable[Line]) -> None:
    """Adds lines in one write."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with file.open("a") as table:
        table.write(text)


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a JSON value, e.g. of the messages of a
    conversation."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
