"""Rows of all forms and files: what is accepted renders, all else is refused."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import RingfenceError
from ringfence.text.chat import Chat
from ringfence.text.encode import encode_rows
from ringfence.text.rows import load_rows

from .harness import knock, tries
from .mutations import csv_files, files, json_lines, spoilt, trees
from .places import Place

TOOL = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}
GOOD: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "A door?"},
            {"role": "assistant", "content": "Red.", "weight": 1},
        ]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": "Noon.", "reasoning_content": "They want the time."},
        ],
        "tools": [TOOL],
    },
    "prompt": {"prompt": "A door?", "completion": "Red.", "system": "Be brief."},
    "turns": {
        "prompt": [{"role": "user", "content": "A door?"}],
        "completion": [{"role": "assistant", "content": "Red."}],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "A door?"}, {"from": "gpt", "value": "Red."}]
    },
    "alpaca": {"instruction": "Name it.", "input": "A door", "output": "Red.", "history": []},
}
TEXTS = [
    {"prompt": "A door?", "completion": "Red.", "system": ""},
    {"prompt": 'A "gate"?', "completion": "Two,\nblue.", "system": "Be brief."},
]


def read(place: Place, chat: Chat, name: str, content: bytes) -> None:
    file = place.file(name, content)
    rows: list[Any] = []

    def call() -> Any:
        rows[:] = load_rows(str(file))
        return encode_rows(rows, chat, 4096, "truncate")

    found = knock(f"rows {file.suffix}", content, call, file.parent, [file.name])
    if isinstance(found, RingfenceError):
        return
    assert len(found) == len(rows) > 0
    for example, row in zip(found, rows):
        assert len(example.input_ids) == len(example.roles)
        assert example.response_tokens > 0
        text = chat.render(row.messages)
        assert all(
            message["content"].strip() in text
            for message in row.messages
            if isinstance(message["content"], str)
        )


@pytest.mark.parametrize("form", GOOD)
def test_rows_of_a_jsonl_file(form: str, place: Place, chat: Chat) -> None:
    good = GOOD[form]

    @given(json_lines([GOOD["messages"], good, GOOD["prompt"]]))
    @tries(0.025)
    def test(content: bytes) -> None:
        read(place, chat, "rows.jsonl", content)

    test()


def test_rows_of_a_json_file(place: Place, chat: Chat) -> None:
    @given(st.sampled_from(list(GOOD.values())).flatmap(lambda good: files([good, good])))
    @tries(0.03)
    def test(content: bytes) -> None:
        read(place, chat, "rows.json", content)

    test()


def test_rows_of_a_csv_file(place: Place, chat: Chat) -> None:
    @given(csv_files(TEXTS))
    @tries(0.06)
    def test(content: bytes) -> None:
        read(place, chat, "rows.csv", content)

    test()


def parquet(rows: list[Any], file: Path) -> bytes | None:
    """What pyarrow makes of rows; None where they fit no columns."""
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    except Exception:  # pyarrow's own, of a dozen kinds
        return None
    return file.read_bytes()


def test_rows_of_a_parquet_file(place: Place, chat: Chat) -> None:
    good = parquet([GOOD["messages"]] * 2, place.fresh() / "good.parquet")
    assert good

    @given(st.one_of(spoilt(good), trees([GOOD["messages"]]), trees([GOOD["prompt"]])))
    @tries(0.03)
    def test(given: Any) -> None:
        content = given if isinstance(given, bytes) else parquet(given, place.fresh() / "x.parquet")
        if content is not None:
            read(place, chat, "rows.parquet", content)

    test()
