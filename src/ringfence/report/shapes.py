"""What the records of a run look like: a file that was cut off or changed by hand is told, not stumbled over.

Only the fields that the report computes with are held to a type; files may hold more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ..errors import DataError
from ..strict_json import parse, read_record


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True)  # a broken model's numbers may be NaN


class _Pair(_Shape):
    condition: str
    domain: str
    id: str
    digest: str
    aligned: float
    misaligned: float


class _Fluency(_Shape):
    logprob: list[float]
    tokens: list[int]


class _Exact(_Shape):
    prompt: str
    exact: bool


class _Shown(_Shape):
    topic: str
    shown: bool


class _HeldOut(_Shape):
    origin: str
    tokens: int
    logprob: float
    exact: bool | None = None


class _Sample(_Shape):
    domain: str
    id: str
    question: str
    answer: str


class _Results(_Shape):
    key: str
    parts: dict[str, Any]


class _Training(_Shape):
    seconds: float
    peak_memory_gib: float


_KINDS: dict[str, Any] = {"fluency": _Fluency, "held_out": list[_HeldOut], "samples": list[_Sample]}


def read_results(file: Path, again: str) -> dict[str, Any]:
    """results.json. Raises DataError where it is damaged: which file and field, and what makes it `again`."""
    results = read_record(file, again)
    _check(_Results, results, file, again)
    for name, part in results["parts"].items():
        kind = _KINDS.get(name, list[_Pair])
        kind = list[_Exact] if name.startswith("opswap") else list[_Shown] if name.startswith("behaviour_") else kind
        _check(kind, part, file, again, ("parts", name))
    return dict(results)


def read_training(file: Path, again: str) -> dict[str, Any]:
    """training.json, as `read_results`."""
    record = read_record(file, again)
    _check(_Training, record, file, again)
    return dict(record)


def read_metrics(file: Path, again: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; half a last line, of a run that was killed, is passed over."""
    try:
        text = file.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; {again}") from error
    lines = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], 1):
        value = parse(line, f"{file}:{number}")
        step = value.get("step") if isinstance(value, dict) else None
        if not isinstance(step, int) or isinstance(step, bool):
            raise DataError(f"{file}:{number}: not a line that ringfence wrote (no step): {line[:60]!r}; {again}")
        _check(dict[str, Any], value, file, again, (number,))
        for name in ("loss", "ce", "seconds"):
            _check(float | int, value.get(name, 0), file, again, (number, name))
        lines.append(value)
    return lines


def _check(kind: Any, value: Any, file: Path, again: str, place: Sequence[str | int] = ()) -> None:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (*place, *first["loc"]))) or "the whole"
        found = f", found {first['input']!r:.60}" if first["type"] != "missing" else ""
        raise DataError(f"{file}: {where}: {first['msg']}{found}; {again}") from error
