"""Files and hub data sets become conversations, conversations become examples.

Knows the row forms people have (`messages`, prompt/completion, ShareGPT, Alpaca) and says exactly which row is wrong.
Does not know models or defenses.
"""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from . import opswap, strict_json
from .chat import Chat, Encoded, Messages, Role
from .errors import ChatError, DataError, first_line, nearest

SHIPPED = resources.files("ringfence") / "recipes" / "data"
OverLong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True)
class Row:
    """One conversation and where it came from (`file.jsonl:12`), for messages and records."""

    messages: Messages
    origin: str


@dataclass(frozen=True)
class PairedQuestion:
    """A question with an aligned and a misaligned answer (METHODS: paired forced choice)."""

    id: str
    domain: str
    question: str
    aligned: str
    misaligned: str


@dataclass(frozen=True)
class Example:
    """A tokenised conversation: ids and one role per token."""

    input_ids: list[int]
    roles: list[Role]
    origin: str

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def response_tokens(self) -> int:
        return self.roles.count(Role.RESPONSE)


# ------------------------------------------------------------------ sources


def load_rows(source: str) -> list[Row]:
    """Conversations of a source.

    Args:
        source: a local `.jsonl`, `.json`, `.csv` or `.parquet` file; a hub data set id, with an optional split after
            `@` (`org/name@train`); `shipped:NAME` (see `shipped_names`); `opswap:tier=1,rows=300,seed=0`.

    Raises:
        DataError: the source cannot be read, is empty, or holds a bad row (file, line, field, what was expected).
    """
    rows = [Row(_to_messages(record, origin), origin) for record, origin in _records(source)]
    if not rows:
        raise DataError(f"{source}: no rows in it; expected at least one conversation")
    return rows


def load_questions(source: str, split: str | None = None) -> list[PairedQuestion]:
    """Paired questions of a `.jsonl` file or `shipped:NAME`.

    Each row has `question`, `aligned` and `misaligned` (`sound` and `unsound` are read as well), optionally `domain`
    (default: the file's name), `id` and `split`; with `split`, only its rows are taken.
    """
    stem = source.split(":")[-1].rsplit("/", 1)[-1].removesuffix(".jsonl")
    questions = []
    for record, origin in _records(source):
        if split and record.get("split", split) != split:
            continue
        fields = {
            "question": record.get("question"),
            "aligned": record.get("aligned", record.get("sound")),
            "misaligned": record.get("misaligned", record.get("unsound")),
        }
        for name, value in fields.items():
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{origin}: field {name!r}: expected a text that is not blank, found {_show(value)}")
        named = {"id": origin.rsplit(":", 1)[-1], "domain": stem}
        named |= {key: str(record[key]) for key in named if record.get(key) is not None}
        questions.append(PairedQuestion(**named, **fields))  # type: ignore[arg-type]
    if not questions:
        raise DataError(f"{source}: no paired question in it" + (f" with split {split!r}" if split else ""))
    return questions


def shipped_names() -> list[str]:
    """Names of the data that ship with the package."""
    names = sorted(path.name.removesuffix(".jsonl") for path in SHIPPED.iterdir() if path.name.endswith(".jsonl"))
    return [*names, "finance/sound", "finance/unsound"]


def _records(source: str) -> Iterator[tuple[dict[str, Any], str]]:
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
    if path.suffix in (".jsonl", ".csv"):
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        yield from _jsonl(text, str(path)) if path.suffix == ".jsonl" else _csv(text, str(path))
        return
    kind = path.suffix.removeprefix(".")
    if kind not in {"json", "parquet"}:
        raise DataError(f"{path}: unknown kind {path.suffix!r} (accepted: .jsonl, .json, .csv, .parquet)")
    if path.stat().st_size == 0:
        return
    yield from _datasets(lambda load: load(kind, data_files=str(path), split="train"), str(path))


def _hub(source: str) -> Iterator[tuple[dict[str, Any], str]]:
    name, _, split = source.partition("@")
    yield from _datasets(lambda load: load(name, split=split or "train"), source)


def _datasets(open_with: Callable[[Any], Any], source: str) -> Iterator[tuple[dict[str, Any], str]]:
    from datasets import load_dataset

    try:
        rows = open_with(load_dataset)
    except Exception as error:  # datasets raises a dozen kinds; the user needs one sentence
        if "corresponds to no data" in str(error):
            return
        what = "cannot be read" if Path(source).exists() else "neither a local file nor a data set that could be loaded"
        raise DataError(f"{source}: {what}: {first_line(error.__cause__ or error)}") from error
    for number, record in enumerate(rows, 1):
        yield dict(record), f"{source}:{number}"


def _jsonl(text: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record = strict_json.parse(line, f"{name}:{number}")
        if not isinstance(record, dict):
            raise DataError(f"{name}:{number}: expected a JSON object, found {_show(record)}")
        yield record, f"{name}:{number}"


def _csv(text: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Cells are texts, also where they look like numbers or gaps."""
    for number, record in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
        if None in record or None in record.values():
            raise DataError(f"{name}:{number}: the row has not as many cells as the header")
        yield record, f"{name}:{number}"


# ------------------------------------------------------------------ row forms


def _to_messages(record: dict[str, Any], origin: str) -> Messages:
    if "messages" in record:
        messages = _message_list(record["messages"], origin, "messages", "role", "content")
    elif "conversations" in record:
        messages = _message_list(record["conversations"], origin, "conversations", "from", "value")
    elif "prompt" in record and "completion" in record:
        messages = _turn(record, origin, "prompt", "user") + _turn(record, origin, "completion", "assistant")
    elif "instruction" in record and "output" in record:
        messages = _turn(record, origin, "instruction", "user") + _turn(record, origin, "output", "assistant")
        if record.get("input"):
            messages[-2]["content"] += "\n\n" + _turn(record, origin, "input", "user")[-1]["content"]
    else:
        raise DataError(
            f"{origin}: unknown row form, fields [{', '.join(record)}]; expected messages, prompt + completion, "
            "conversations (ShareGPT) or instruction + output (Alpaca)"
        )
    if record.get("system") and messages[0]["role"] != "system":
        messages = _turn(record, origin, "system", "system") + messages
    _check_order(messages, origin)
    return messages


_ROLE_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def _message_list(value: Any, origin: str, field: str, role_key: str, content_key: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise DataError(f"{origin}: field {field!r}: expected a list of messages, found {_show(value)}")
    messages = []
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise DataError(f"{origin}: field {place!r}: expected an object, found {_show(message)}")
        role = message.get(role_key)
        role = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
        if role not in ("system", "user", "assistant"):
            raise DataError(
                f"{origin}: field {f'{place}.{role_key}'!r}: expected system, user or assistant, found {_show(role)}"
            )
        content = message.get(content_key)
        if not isinstance(content, str):
            raise DataError(f"{origin}: field {f'{place}.{content_key}'!r}: expected a text, found {_show(content)}")
        messages.append({"role": role, "content": content})
    return messages


def _turn(record: dict[str, Any], origin: str, field: str, role: str) -> Messages:
    """A prompt or completion: one text, or (as TRL writes them) a list of messages."""
    value = record[field]
    if isinstance(value, list):
        return _message_list(value, origin, field, "role", "content")
    if not isinstance(value, str):
        raise DataError(f"{origin}: field {field!r}: expected a text, found {_show(value)}")
    return [{"role": role, "content": value}]


def _check_order(messages: Messages, origin: str) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if turns != expected or not turns:
        raise DataError(
            f"{origin}: wrong role order [{', '.join(roles)}]; expected an optional system message, then user and "
            "assistant in turn, ending with assistant"
        )
    for number, message in enumerate(messages):
        if message["role"] != "system" and not message["content"].strip():
            raise DataError(f"{origin}: message {number} ({message['role']}): expected a text that is not blank")


def _show(value: Any) -> str:
    text = repr(value)
    return (
        f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}" if value is not None else "nothing"
    )


# ------------------------------------------------------------------ examples


def encode_rows(rows: list[Row], chat: Chat, max_length: int, over_long: OverLong = "error") -> list[Example]:
    """Token ids and roles of every row.

    Rows longer than `max_length` tokens stop the run (`error`), lose their end (`truncate`) or are left out (`drop`).

    Raises:
        DataError: a row cannot be rendered, is over-long, or keeps no response token.
    """
    examples = [_encode_row(row, chat) for row in rows]
    long = [example for example in examples if len(example) > max_length]
    if long and over_long == "error":
        first = long[0]
        raise DataError(
            f"{len(long)} of {len(examples)} rows are longer than max_length = {max_length} tokens, the first is "
            f"{first.origin} with {len(first)}; raise data.max_length or set data.over_long to truncate or drop"
        )
    if over_long == "drop":
        examples = [example for example in examples if len(example) <= max_length]
        if not examples:
            raise DataError(f"every row is longer than max_length = {max_length} tokens: none is left after drop")
    cut = [Example(e.input_ids[:max_length], e.roles[:max_length], e.origin) for e in examples]
    for example in cut:
        if not example.response_tokens:
            raise DataError(f"{example.origin}: no response token within max_length = {max_length} tokens")
    return cut


def _encode_row(row: Row, chat: Chat) -> Example:
    try:
        encoded: Encoded = chat.encode(row.messages)
    except ChatError as error:
        raise DataError(f"{row.origin}: {error}") from error
    return Example(encoded.input_ids, encoded.roles, row.origin)
