"""Good files, and what people, editors, servers and full disks make of them. Strategies of
hypothesis; knows no door.

A tree is plain JSON data. `Pairs` is an object whose keys may be there twice, `Raw` a piece of text
that is written as it is: both are things that no tree of plain data can say.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
Path = tuple[Any, ...]


class Raw(str):
    """A text that is in the file without quotes."""


class Pairs(list[tuple[str, Any]]):
    """An object, pair by pair."""


# ------------------------------------------------------------------ values

TEXTS = [
    "",
    " ",
    "\n",
    "\0",
    "\ufeff",
    "\ud800",
    "\udfff\ud800",
    "\u202eevil",
    "\x1b[31mred\x1b[2J",
    "\x85\u2028\u2029",
    "x" * 20_000,
    "<|im_start|>system\n<|im_end|>",
    "../../outside",
    "/",
    ".",
    "~",
    "~nobody/x",
    "default",
    "shipped:finance",
    "shipped:",
    "opswap:",
    "opswap:tier=9",
    "None",
    "null",
    "nan",
    "1e999",
    "{{ 7 * 7 }}",
    "{% for x in",
    "<script>alert(1)</script>",
    "[bold]",
    "%s %(x)s {x}",
    "a/b/c",
    "https://user:pass@localhost:1/v1",
    "a" * 300,
    "\u0130\u0131\u00df\ufb01",
    "e\u0301" * 40,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "true",
    "2024-01-05",
    "0x10",
]
NUMBERS = [0, 1, -1, 2, 2**31, 2**63, 2**64, 10**26, -(10**30), 0.5, -0.0, 1e300, -1e-300, 1.0, 3.7]
RAWS = [
    Raw("NaN"),
    Raw("Infinity"),
    Raw("-Infinity"),
    Raw("1e999"),
    Raw("9" * 5_000),
    Raw("-" + "9" * 5_000),
    Raw("[" * 400 + "]" * 400),
    Raw("[" * 3_000 + "]" * 3_000),
    Raw('{"a":' * 3_000 + "1" + "}" * 3_000),
    Raw("[" * 100_000),
    Raw("01"),
    Raw("'single'"),
    Raw(""),
    Raw("undefined"),
    Raw('"\\x"'),
    Raw('"\\ud800"'),
    Raw('"\\u0000"'),
]
YAML_RAWS = [
    Raw(text)
    for text in (
        "!!python/object/apply:os.system ['true']",
        "!!binary x",
        "!!binary aGVsbG8=",
        "!!set {a, b}",
        "!!timestamp 2024-01-05",
        "!!int x",
        "!!float x",
        "!unknown 1",
        "2024-01-05",
        "2024-13-45",
        "0o777",
        "0b2",
        "1:30",
        "1:30:99",
        "1_000",
        "_",
        "=",
        "<<",
        "~",
        ".nan",
        ".inf",
        "-.inf",
        "yes",
        "&a [*a]",
        "&a {b: *a}",
        "*nothing",
        "{? [1]: 2}",
        "{? {a: 1}: 2}",
        "{<<: 1}",
        "{<<: [1, 2]}",
        "{<<: {rank: 1}}",
        "{1: 2, 1.0: 3}",
        "{true: 1, 1: 2}",
        "{null: 1}",
        "{a, b}",
        "%TAG",
        "@x",
        "`x`",
        "|",
        ">-",
        "- x",
        "a: b: c",
        "#",
        "\t",
        "[&a [x, x], &b [*a, *a], &c [*b, *b], &d [*c, *c], "
        "&e [*d, *d], &f [*e, *e], &g [*f, *f], &h [*g, *g]]",
    )
]


def values() -> st.SearchStrategy[Any]:
    """A value of any type, most of them trouble."""
    plain = [None, True, False, [], {}, [[]], [None], {"": None}, [{}], {"a": {"b": [1]}}]
    return st.one_of(
        st.sampled_from(TEXTS),
        st.sampled_from(NUMBERS),
        st.sampled_from(RAWS),
        st.sampled_from(plain),
        st.text(max_size=30),
        st.integers(),
        st.floats(),
        st.lists(st.one_of(st.text(max_size=5), st.integers(), st.none()), max_size=3),
        st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    )


# ------------------------------------------------------------------ trees


def places(tree: Any, below: Path = ()) -> list[tuple[Path, Any]]:
    """Paths and values of a tree, its own first."""
    items: Sequence[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list) and not isinstance(tree, Pairs):
        items = list(enumerate(tree))
    return [
        (below, tree),
        *(found for key, value in items for found in places(value, (*below, key))),
    ]


def changed(tree: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """A copy of a tree with another value at a path."""
    if not path:
        return change(tree)
    key, rest = path[0], path[1:]
    if isinstance(tree, dict):
        return {
            name: changed(value, rest, change) if name == key else value
            for name, value in tree.items()
        }
    return [
        changed(value, rest, change) if place == key else value for place, value in enumerate(tree)
    ]


@st.composite
def trees(draw: Draw, good: Any, odd: st.SearchStrategy[Any] | None = None) -> Any:
    """A good tree after one to three changes of its structure."""
    odd = values() if odd is None else st.one_of(odd, values())
    tree = good
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        path, _ = draw(st.sampled_from(places(tree)))
        tree = changed(tree, path, lambda value: _mutated(draw, value, odd))
    return tree


def _mutated(draw: Draw, value: Any, odd: st.SearchStrategy[Any]) -> Any:
    kinds = ["replace"] * 4 + ["wrap", "name", "type"]
    if isinstance(value, dict) and value:
        kinds += ["remove", "double", "rename", "add"] * 2
    if isinstance(value, list) and value and not isinstance(value, Pairs):
        kinds += ["drop", "repeat", "reverse", "insert"] * 2
    if isinstance(value, str):
        kinds += ["inside"] * 4
    kind = draw(st.sampled_from(kinds))
    if kind == "wrap":
        return [value]
    if kind == "name":
        return {draw(st.sampled_from(["a", "value", "text", ""])): value}
    if kind == "type":
        return draw(st.sampled_from([str(value), [], {}, None, True, 7]))
    if kind in ("remove", "double", "rename", "add"):
        return _other_keys(draw, value, kind, odd)
    if kind in ("drop", "repeat", "reverse", "insert"):
        return _other_items(draw, value, kind, odd)
    if kind == "inside":
        at = draw(st.integers(0, len(value)))
        return (
            value[:at]
            + draw(st.sampled_from(TEXTS))
            + value[at + draw(st.sampled_from([0, 0, 1, 1_000])) :]
        )
    return draw(odd)


def _other_keys(draw: Draw, value: dict[str, Any], kind: str, odd: st.SearchStrategy[Any]) -> Any:
    key = draw(st.sampled_from(list(value)))
    if kind == "add":
        return {**value, draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=8))): draw(odd)}
    if kind == "double":
        return Pairs([*value.items(), (key, draw(st.one_of(st.just(value[key]), odd)))])
    rest = {name: item for name, item in value.items() if name != key}
    if kind == "remove":
        return rest
    other = draw(
        st.sampled_from([str(key).upper(), f"{key}s", str(key)[:-1], f" {key}", "", *TEXTS[:12]])
    )
    return {**rest, other: value[key]}


def _other_items(draw: Draw, value: list[Any], kind: str, odd: st.SearchStrategy[Any]) -> Any:
    at = draw(st.integers(0, len(value) - 1))
    if kind == "drop":
        return value[:at] + value[at + 1 :]
    if kind == "repeat":
        return value[:at] + [value[at]] * draw(st.sampled_from([2, 3, 50])) + value[at + 1 :]
    if kind == "reverse":
        return value[::-1]
    return [*value[:at], draw(odd), *value[at:]]


# ------------------------------------------------------------------ texts


def written(tree: Any) -> str:
    """A tree as JSON (and, but for rarities, YAML), with `Raw` and `Pairs` as they are."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, Pairs):
        return (
            "{"
            + ", ".join(f"{json.dumps(str(key))}: {written(value)}" for key, value in tree)
            + "}"
        )
    if isinstance(tree, dict):
        return written(Pairs(tree.items()))
    if isinstance(tree, list | tuple):
        return "[" + ", ".join(map(written, tree)) + "]"
    return json.dumps(tree)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


ODD_BYTES = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xc3",
    b"\x1b[2J",
    b"\r",
    b"\r\n",
    b"\n",
    b"\n\n",
    b"\t",
    b'"',
    b"'",
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"#",
    b"*",
    b"&a ",
    b"<<<<<<< HEAD\n",
    b"x" * 10_000,
    b"[" * 5_000,
    b"- " * 2_000,
]


@st.composite
def spoilt(draw: Draw, good: bytes) -> bytes:
    """Good bytes after one to three accidents."""
    data = good
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        at = draw(st.integers(0, len(data)))
        kind = draw(
            st.sampled_from(
                ["flip", "cut", "insert", "insert", "remove", "double", "encode", "zeros"]
            )
        )
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = (
                data[:at]
                + draw(st.one_of(st.sampled_from(ODD_BYTES), st.binary(max_size=8)))
                + data[at:]
            )
        elif kind == "remove":
            data = data[:at] + data[at + draw(st.sampled_from([1, 2, 8, 64])) :]
        elif kind == "double":
            end = at + draw(st.sampled_from([1, 8, 64, 1_000]))
            data = data[:end] + data[at:end] + data[end:]
        elif kind == "encode":
            name = draw(st.sampled_from(["utf-16", "utf-32-be", "latin-1", "utf-8-sig", "cp037"]))
            data = data.decode("utf-8", "replace").encode(name, "replace")
        elif kind == "zeros":
            data = data[:at] + b"\0" * (len(data) - at)
    return data


def files(good: Any, odd: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[bytes]:
    """Bytes of a JSON or YAML file: mostly a good tree with another structure, else spoilt bytes,
    rarely noise."""
    structured = trees(good, odd).map(written).map(encoded)
    return mixed(structured, written(good).encode())


def texts(good: str) -> st.SearchStrategy[bytes]:
    """Bytes of a text file: lines taken away, doubled or moved, else spoilt bytes, rarely noise."""
    return mixed(_other_lines(good), good.encode())


@st.composite
def _other_lines(draw: Draw, good: str) -> bytes:
    lines = good.splitlines()
    for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
        at = draw(st.integers(0, max(len(lines) - 1, 0)))
        kind = draw(
            st.sampled_from(["drop", "double", "indent", "outdent", "tail", "insert", "swap"])
        )
        line = lines[at] if at < len(lines) else ""
        other = {
            "drop": [],
            "double": [line, line],
            "indent": ["  " + line],
            "outdent": [line.lstrip()],
            "tail": [line + str(draw(st.sampled_from([*RAWS, *YAML_RAWS, *TEXTS])))],
            "insert": [str(draw(st.sampled_from([*RAWS, *YAML_RAWS, *TEXTS]))), line],
            "swap": [line[::-1]],
        }
        lines[at : at + 1] = other[kind]
    return encoded("\n".join(lines) + "\n")


def mixed(structured: st.SearchStrategy[bytes], good: bytes) -> st.SearchStrategy[bytes]:
    return st.integers(0, 19).flatmap(
        lambda at: structured if at < 13 else spoilt(good) if at < 19 else st.binary(max_size=200)
    )


@st.composite
def lines(draw: Draw, good: Sequence[Any]) -> bytes:
    """A JSON-lines file with one bad line among good ones."""
    at = draw(st.integers(0, len(good) - 1))
    rows = [written(row) for row in good]
    rows[at] = written(draw(trees(good[at])))
    ending = draw(st.sampled_from(["\n", "\n", "\n", "\r\n", "\r", "\u2028", "\n\n", ""]))
    return encoded(ending.join(rows) + ending)


def json_lines(good: Sequence[Any]) -> st.SearchStrategy[bytes]:
    return mixed(lines(good), "".join(written(row) + "\n" for row in good).encode())


@st.composite
def _cells(draw: Draw, good: list[dict[str, str]]) -> bytes:
    header, table = list(good[0]), [list(row.values()) for row in good]
    cells = [header, *table]
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        row = cells[draw(st.integers(0, len(cells) - 1))]
        at = draw(st.integers(0, max(len(row) - 1, 0)))
        kind = draw(st.sampled_from(["replace", "drop", "double", "quote"]))
        cell = row[at] if at < len(row) else ""
        text = str(draw(values())) if kind == "replace" else f'"{cell}'
        row[at : at + 1] = {"replace": [text], "drop": [], "double": [cell, cell], "quote": [text]}[
            kind
        ]
    text = io.StringIO()
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    delimiter = draw(st.sampled_from([",", ",", ",", ";", "\t"]))
    if draw(st.booleans()):
        csv.writer(text, quoting=quoting, delimiter=delimiter, lineterminator="\n").writerows(cells)
        return encoded(text.getvalue())
    return encoded("".join(delimiter.join(row) + "\n" for row in cells))


def csv_files(good: list[dict[str, str]]) -> st.SearchStrategy[bytes]:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(good[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(good)
    return mixed(_cells(good), text.getvalue().encode())
