"""A table that grows line by line and outlives a killed run: JSON lines below a header that says what they belong to.

Also the digests that a header is made of: of a conversation, of a model or adapter. Does not know what is in the lines.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..errors import DataError, RingfenceError
from ..model.models import adapter_base, cache_folder, load_config, resolve
from ..runfolder.folder import write_whole
from .strict_json import check_shape, parse

Line = dict[str, Any]


class _Header(BaseModel):
    key: dict[str, Any]


_LARGE, _SETTLED = 2**24, 2.0  # bytes; seconds


def open_journal(
    file: Path, kind: str, key: dict[str, Any], about: dict[str, Any], shape: Any = dict[str, Any]
) -> list[Line]:
    """The whole lines that stand in a table; where there is none, it is made. Half a last line is cut off.

    Args:
        kind: what kind of table it is.
        key: what its lines depend on; a table with lines of another key is refused.
        about: more for the header, for people.
        shape: type of a line, for pydantic.

    Raises:
        DataError: the file is of another kind or key, or a line is damaged.
    """
    first = json.dumps({"table": kind, "key": key, **about}) + "\n"
    text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
    if first.startswith(text):
        write_whole(file, first)
        return []
    whole = text[: text.rfind("\n") + 1]
    header, lines = split_table(whole, file, kind, shape)
    if not lines:
        write_whole(file, first)
        return []
    for part, here in key.items():
        there = header["key"].get(part) if isinstance(header.get("key"), dict) else None
        if there != here:
            raise DataError(
                f"{file} was made with {part} {there!r}, not with {here!r} (names or fingerprints); name another "
                "output, or delete the file"
            )
    if whole != text:
        os.truncate(file, len(whole.encode()))
    return lines


def split_table(text: str, file: Path, kind: str, shape: Any = dict[str, Any]) -> tuple[Line, list[Line]]:
    """Header and lines of a table's text; `shape` is the type of a line, for pydantic.

    Raises:
        DataError: it is no table of this kind, or a line is damaged.
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
            raise DataError(f"{file}:{number}: expected a line of a table of {kind}, found {line[:60]!r}")
    if not parsed or not isinstance(parsed[0], dict) or parsed[0].get("table") != kind:
        raise DataError(f"{file}: expected a table of {kind} (its first line says so), found something else")
    for number, value in enumerate(parsed[1:], 2):
        check_shape(shape, value, f"{file}:{number}", "delete the line, and the same command makes it again")
    check_shape(_Header, parsed[0], f"{file}:1", "delete the file, and the same command makes it again")
    return parsed[0], parsed[1:]


def append(file: Path, lines: Iterable[Line]) -> None:
    """Adds lines, in one write."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with file.open("a") as table:
        table.write(text)


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a JSON value, e.g. of the messages of a conversation."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(source: str) -> str:
    """What tells one model or adapter from another: a digest of the files of its folder (weights, configs, tokenizer,
    chat template), and of its base where it is an adapter; or the revision of a hub id.

    Raises:
        ModelError: there is no such model.
    """
    folder = Path(resolve(source))
    if not folder.is_dir():
        return str(load_config(source)._commit_hash)
    total = hashlib.sha256()
    for file in _content(folder):
        total.update(file.relative_to(folder).as_posix().encode() + _digest_of(file))
    base = adapter_base(folder)
    if base:
        total.update(fingerprint(base).encode())
    return total.hexdigest()[:16]


def _content(folder: Path) -> list[Path]:
    """The files that a model is made of, chat templates besides the main one too."""
    files = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return sorted(f for f in files if f.is_file() and f.suffix != ".md" and not f.name.startswith("."))


def _digest_of(file: Path) -> bytes:
    """SHA-256 of a file. That of a large one is kept in the cache folder, by what tells that it has not been written
    since; its time of change, unlike that of modification, cannot be set back."""
    about = file.stat()
    if about.st_size < _LARGE:
        return _sha256(file)
    known = [str(file.resolve()), about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]
    kept = cache_folder() / "fingerprints" / digest(known)
    with suppress(OSError, ValueError):
        found = bytes.fromhex(kept.read_text("utf-8"))
        if len(found) == hashlib.sha256().digest_size:
            return found
    found = _sha256(file)
    if time.time() - about.st_ctime > _SETTLED:  # a later write within one tick of the clock would not show
        with suppress(RingfenceError):  # a cache that cannot be written only costs time
            write_whole(kept, found.hex())
    return found


def _sha256(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
