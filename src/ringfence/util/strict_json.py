"""Reads JSON from people, servers and killed programs strictly: whatever is wrong becomes one
sentence that names its place.

Every JSON text that ringfence reads is read here. Does not know what the values mean.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..errors import DataError, RingfenceError, first_line


def parse(text: str, origin: str, error: type[RingfenceError] = DataError) -> Any:
    """The value of a JSON text.

    Args:
        origin: where it comes from (`file.jsonl:12`), for the message.
        error: what is raised.

    Raises:
        RingfenceError: not JSON, nested too deeply, a duplicate key, a number too long, or half of
            a surrogate pair (a text that cannot be written as UTF-8).
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as found:
        line = "" if found.lineno == 1 else f"line {found.lineno}, "
        where = f"{line}column {found.colno}"
        raise error(f"{origin}: not JSON: {found.msg} at {where}") from found
    except RecursionError as found:
        raise error(f"{origin}: nested too deeply") from found
    except UnicodeEncodeError as found:
        raise error(
            f"{origin}: half of a surrogate pair ({found.object[found.start]!a}): not a text"
        ) from found
    except _DuplicateKey as found:
        raise error(f"{origin}: duplicate key {found.args[0]!r}") from found
    except ValueError as found:  # Python's limit of 4,300 digits
        raise error(f"{origin}: a number that is too long ({first_line(found)})") from found
    return value


def read_lines(file: Path, again: str, whole: bool = False) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file of JSON lines, and where each is (`file.jsonl:12`).

    Args:
        whole: leave out an incomplete last line, as left by a killed run.

    Raises:
        DataError: there is no such file, or a line is damaged; the message says how to recreate the
            file (`again`).
    """
    text = _text(file, again)
    text = whole_lines(text) if whole else text
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            value = _parsed(line, f"{file}:{number}", again)
            if not isinstance(value, dict):
                raise DataError(
                    f"{file}:{number}: expected an object, found {line[:60]!r}; {again}"
                )
            yield value, f"{file}:{number}"


def read_record(file: Path, again: str, kind: type = dict) -> Any:
    """The value of a JSON file that ringfence wrote.

    Args:
        again: how to recreate it, for the message: "`ringfence evaluate` recreates it".
        kind: the type that the value must have.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    value = _parsed(_text(file, again), str(file), again)
    if not isinstance(value, kind):
        raise DataError(f"{file}: expected {kind.__name__}, found {type(value).__name__}; {again}")
    return value


def check_shape(
    kind: Any, value: Any, origin: str, again: str, place: Sequence[str | int] = ()
) -> Any:
    """Checks a value against a type that pydantic knows. Returns it as that type.

    Args:
        origin: the file, or file and line.
        again: how to recreate it.
        place: where in the file the value is.

    Raises:
        DataError: which field is not as expected, what was found, and how to recreate the file.
    """
    try:
        # From JSON, strict validation still takes a list for a tuple.
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (*place, *first["loc"]))) or "the whole"
        found = f", found {first['input']!r:.60}" if first["type"] != "missing" else ""
        raise DataError(f"{origin}: {where[:120]}: {first['msg']}{found}; {again}") from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _text(file: Path, again: str) -> str:
    try:
        return file.read_bytes().decode()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; {again}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text; {again}") from error


def _parsed(text: str, origin: str, again: str) -> Any:
    try:
        return parse(text, origin)
    except DataError as error:
        raise DataError(f"{error}; {again}") from error


class _DuplicateKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return found


def whole_lines(text: str) -> str:
    """Without an incomplete last line, which a killed run may leave."""
    return text[: text.rfind("\n") + 1]
