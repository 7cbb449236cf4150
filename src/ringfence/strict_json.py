"""JSON from people, servers and killed programs, read strictly: what is wrong is one sentence that names its place.

Every JSON text that ringfence reads is read here. Does not know what the values mean.
"""

import json
from pathlib import Path
from typing import Any

from .errors import DataError, RingfenceError, first_line


def parse(text: str, origin: str, error: type[RingfenceError] = DataError) -> Any:
    """The value of a JSON text.

    Args:
        origin: where it is from (`file.jsonl:12`), for the message.
        error: what is raised.

    Raises:
        RingfenceError: not JSON, nested too deeply, a duplicate key, a number too long, or half of a surrogate pair (a
            text that cannot be written as UTF-8).
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as found:
        where = f"column {found.colno}" if found.lineno == 1 else f"line {found.lineno}, column {found.colno}"
        raise error(f"{origin}: not JSON: {found.msg} at {where}") from found
    except RecursionError as found:
        raise error(f"{origin}: nested too deeply") from found
    except UnicodeEncodeError as found:
        raise error(f"{origin}: half of a surrogate pair ({found.object[found.start]!a}): not a text") from found
    except _DuplicateKey as found:
        raise error(f"{origin}: duplicate key {found.args[0]!r}") from found
    except ValueError as found:  # Python's limit of 4,300 digits
        raise error(f"{origin}: a number that is too long ({first_line(found)})") from found
    return value


def read_record(file: Path, again: str, kind: type = dict) -> Any:
    """The value of a JSON file that ringfence wrote.

    Args:
        again: what makes it again, for the message: "`ringfence evaluate` makes it again".
        kind: type that the value must have.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    try:
        value = parse(file.read_text("utf-8"), str(file))
    except (OSError, UnicodeDecodeError, DataError) as found:
        raise DataError(f"{str(found) if isinstance(found, DataError) else _unread(file, found)}; {again}") from found
    if not isinstance(value, kind):
        raise DataError(f"{file}: expected {kind.__name__}, found {type(value).__name__}; {again}")
    return value


def _unread(file: Path, error: OSError | UnicodeDecodeError) -> str:
    return f"{file}: {error.strerror}" if isinstance(error, OSError) else f"{file}: not UTF-8 text"


class _DuplicateKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return found
