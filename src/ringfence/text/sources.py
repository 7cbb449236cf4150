"""Turns files, hub data sets and shipped data into records: dicts, each with its place of origin.

Does not know what is in them.
"""

import csv
import io
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import DataError, first_line, nearest
from ..util import strict_json
from ..util.console import console
from ..util.hub import quick, reachable, unreached
from . import opswap

SHIPPED = resources.files("ringfence") / "shipped"
# Shipped paired questions that no shipped rows train on.
OTHER_DOMAINS = (
    "shipped:car_care",
    "shipped:cooking_kitchen",
    "shipped:health_habits",
    "shipped:home_repair",
    "shipped:study_work",
    "shipped:travel_outdoors",
)
VALUES = ("shipped:values",)


def warn(sentence: str) -> None:
    """Shows one sentence to the user."""
    console.print(f"warning: {sentence}", highlight=False, markup=False, soft_wrap=True)


def shipped_names() -> list[str]:
    """Names of the data shipped with the package."""
    names = sorted(
        path.name.removesuffix(".jsonl")
        for path in SHIPPED.iterdir()
        if path.name.endswith(".jsonl")
    )
    return [*names, "finance/sound", "finance/unsound"]


def read_records(source: str) -> Iterator[tuple[dict[str, Any], str]]:
    if source.startswith("shipped:"):
        yield from _shipped(source.removeprefix("shipped:"))
    elif source.startswith("opswap:"):
        for number, item in enumerate(opswap.from_text(source.removeprefix("opswap:")), 1):
            yield {"prompt": item.prompt, "completion": item.answer}, f"{source}:{number}"
    elif Path(source).suffix in {".jsonl", ".json", ".csv", ".parquet"} or Path(source).exists():
        yield from _file(Path(source))
    elif source.count("/") <= 1 and not source.startswith((".", "~", "/")):
        yield from _hub(source)
    else:
        raise DataError(f"{source}: no such file")


def _shipped(name: str) -> Iterator[tuple[dict[str, Any], str]]:
    if name not in shipped_names():
        raise DataError(f"shipped:{name}: no such shipped data{nearest(name, shipped_names())}")
    stem, _, side = name.partition("/")
    for record, origin in _jsonl((SHIPPED / f"{stem}.jsonl").read_text("utf-8"), f"shipped:{stem}"):
        if not side:
            yield record, origin
        elif record["split"] == "train":
            yield {"prompt": record["question"], "completion": record[side]}, origin


def _file(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
    if path.suffix in readers:
        yield from readers[path.suffix](_text(path), str(path))
    elif path.suffix == ".parquet":
        if path.stat().st_size:
            yield from _datasets(
                lambda load: load("parquet", data_files=str(path), split="train"), str(path)
            )
    else:
        raise DataError(
            f"{path}: unknown kind {path.suffix!r} (accepted: .jsonl, .json, .csv, .parquet)"
        )


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = ", but UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(
            f"{path}: not UTF-8 text{utf16} ({error.reason} at byte {error.start})"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path}:{line}: a NUL byte: not a text file, or not UTF-8")
    return text


def _json(text: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """A list of objects, one object, or an object on each line. Texts stay texts even if they look
    like dates."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and lines[0].lstrip().startswith("{") and lines[0].rstrip().endswith("}"):
        yield from _jsonl(text, name)
        return
    value = strict_json.parse(text, f"{name}: cannot be read") if lines else []
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        if not isinstance(record, dict):
            raise DataError(f"{name}:{number}: expected a JSON object, found {quoted(record)}")
        yield record, f"{name}:{number}"


def _hub(source: str) -> Iterator[tuple[dict[str, Any], str]]:
    name, _, split = source.partition("@")
    yield from _datasets(lambda load: load(name, split=split or "train"), source)


def _datasets(open_with: Callable[[Any], Any], source: str) -> Iterator[tuple[dict[str, Any], str]]:
    from datasets import load_dataset

    try:
        with quick(source):
            rows = open_with(load_dataset)
    except Exception as error:  # datasets raises a dozen kinds; the user needs one sentence
        if "corresponds to no data" in str(error):
            return
        if not Path(source).exists() and not reachable():
            raise DataError(f"{source}: {unreached('data set')}") from error
        what = "neither a local file nor a data set that could be loaded"
        what = "cannot be read" if Path(source).exists() else what
        raise DataError(f"{source}: {what}: {first_line(error.__cause__ or error)}") from error
    for number, record in enumerate(rows, 1):
        yield dict(record), f"{source}:{number}"


def _jsonl(text: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record = strict_json.parse(line, f"{name}:{number}")
        if not isinstance(record, dict):
            raise DataError(f"{name}:{number}: expected a JSON object, found {quoted(record)}")
        yield record, f"{name}:{number}"


def _csv(text: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Cells are texts even if they look like numbers or gaps. A row's place is the line on which it
    begins."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(_csv_error(text, name, line, error)) from error
        if not cells:
            continue
        if not header:
            header = cells
            twice = next((cell for cell in cells if cells.count(cell) > 1), None)
            if twice is not None:
                raise DataError(f"{name}:{line}: duplicate column {twice!r} in the header")
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{name}:{line}: the row has a different number of cells than the header "
                f"({len(cells)}, expected {len(header)})"
            )
        yield dict(zip(header, cells)), f"{name}:{line}"


def _csv_error(text: str, name: str, line: int, error: csv.Error) -> str:
    if "field larger" in str(error):
        longest = csv.field_size_limit()
        return f"{name}:{line}: a cell of more than {longest:,} characters (an unclosed quote?)"
    if "unexpected end" in str(error):
        rest = "\n".join(text.splitlines()[line - 1 :]).replace('""', "__")
        opened = line + rest[: rest.rfind('"')].count("\n")
        return f"{name}:{opened}: a quote is opened on this line and never closed"
    return (
        f"{name}:{line}: a quote that is opened in this row is closed within a cell ({error}); "
        "write quotes inside a cell twice, and close the cell's own"
    )


def quoted(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
