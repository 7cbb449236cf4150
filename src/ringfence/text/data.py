"""Files and hub data sets become conversations, conversations become examples.

Knows the row forms people have (`messages`, prompt/completion, ShareGPT, Alpaca) and says exactly which row is wrong.
Does not know models or defenses.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..errors import ChatError, DataError, first_line, nearest
from ..util import strict_json
from ..util.console import console
from ..util.hub import quick, reachable, unreached
from ..util.words import counted
from . import opswap
from .batch import Example
from .chat import Chat
from .roles import Encoded, Messages, is_learnt

SHIPPED = resources.files("ringfence") / "shipped"
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


# ------------------------------------------------------------------ sources


def load_rows(source: str) -> list[Row]:
    """Conversations of a source.

    Args:
        source: a local `.jsonl`, `.json`, `.csv` or `.parquet` file; a hub data set id, with an optional split after
            `@` (`org/name@train`); `shipped:NAME` (see `shipped_names`); `opswap:tier=1,rows=300,seed=0`.

    What is not read of the rows is named once.

    Raises:
        DataError: the source cannot be read, is empty, or holds a bad row (file, line, field, what was expected).
    """
    unread: Counter[str] = Counter()
    rows = [Row(_to_messages(record, origin, unread), origin) for record, origin in _records(source)]
    if not rows:
        raise DataError(f"{source}: no rows in it; expected at least one conversation")
    _name_unread(source, unread)
    return rows


_WARNED: set[tuple[str, ...]] = set()


def _name_unread(source: str, unread: Counter[str]) -> None:
    if not unread or source.startswith("shipped:") or (source, *unread) in _WARNED:
        return
    _WARNED.add((source, *unread))
    names = ", ".join(f"{name} ({count})" for name, count in sorted(unread.items()))
    warn(f"{source}: fields that are not read (and the number of rows or messages that have them): {names}")


def warn(sentence: str) -> None:
    """Shows one sentence to the user."""
    console.print(f"warning: {sentence}", highlight=False, markup=False, soft_wrap=True)


_OF_QUESTIONS = {"question", "aligned", "misaligned", "sound", "unsound", "domain", "id", "split"}


def load_questions(source: str, split: str | None = None) -> list[PairedQuestion]:
    """Paired questions of a `.jsonl` file or `shipped:NAME`.

    Each row has `question`, `aligned` and `misaligned` (`sound` and `unsound` are read as well), optionally `domain`
    (default: the file's name), `id` and `split`; with `split`, only its rows are taken.
    """
    stem = source.split(":")[-1].rsplit("/", 1)[-1].removesuffix(".jsonl")
    questions = []
    unread: Counter[str] = Counter()
    for record, origin in _records(source):
        _count_unread(record, _OF_QUESTIONS, origin, unread)
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
    _name_unread(source, unread)
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
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
    if path.suffix in readers:
        yield from readers[path.suffix](_text(path), str(path))
    elif path.suffix == ".parquet":
        if path.stat().st_size:
            yield from _datasets(lambda load: load("parquet", data_files=str(path), split="train"), str(path))
    else:
        raise DataError(f"{path}: unknown kind {path.suffix!r} (accepted: .jsonl, .json, .csv, .parquet)")


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = ", but UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(f"{path}: not UTF-8 text{utf16} ({error.reason} at byte {error.start})") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path}:{line}: a NUL byte: not a text file, or not UTF-8")
    return text


def _json(text: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """A list of objects, one object, or an object on each line. Texts stay texts, also where they look like dates."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and lines[0].lstrip().startswith("{") and lines[0].rstrip().endswith("}"):
        yield from _jsonl(text, name)
        return
    value = strict_json.parse(text, f"{name}: cannot be read") if lines else []
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        if not isinstance(record, dict):
            raise DataError(f"{name}:{number}: expected a JSON object, found {_show(record)}")
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
    """Cells are texts, also where they look like numbers or gaps. A row's place is the line on which it begins."""
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
                f"{name}:{line}: the row has a different number of cells than the header ({len(cells)}, expected "
                f"{len(header)})"
            )
        yield dict(zip(header, cells)), f"{name}:{line}"


def _csv_error(text: str, name: str, line: int, error: csv.Error) -> str:
    if "field larger" in str(error):
        return f"{name}:{line}: a cell of more than {csv.field_size_limit():,} characters (an unclosed quote?)"
    if "unexpected end" in str(error):
        rest = "\n".join(text.splitlines()[line - 1 :]).replace('""', "__")
        opened = line + rest[: rest.rfind('"')].count("\n")
        return f"{name}:{opened}: a quote is opened on this line and never closed"
    return (
        f"{name}:{line}: a quote that is opened in this row is closed within a cell ({error}); write quotes inside a "
        "cell twice, and close the cell's own"
    )


# ------------------------------------------------------------------ row forms


_FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output", "input", "history"),
}
_MEDIA = ("images", "image", "audios", "audio", "videos", "video")


def _to_messages(record: dict[str, Any], origin: str, unread: Counter[str]) -> Messages:
    if "messages" in record:
        form = "messages"
        messages = _message_list(record["messages"], origin, "messages", "role", "content", unread)
    elif "conversations" in record:
        form = "conversations"
        messages = _message_list(record["conversations"], origin, "conversations", "from", "value", unread)
    elif "prompt" in record and "completion" in record:
        form = "prompt"
        messages = _turn(record, origin, "prompt", "user", unread)
        messages += _turn(record, origin, "completion", "assistant", unread)
    elif "instruction" in record and "output" in record:
        form = "instruction"
        messages = _turn(record, origin, "instruction", "user", unread)
        messages += _turn(record, origin, "output", "assistant", unread)
        if str(record.get("input") or "").strip():
            messages[-2]["content"] += "\n\n" + _turn(record, origin, "input", "user", unread)[-1]["content"]
        messages = _history(record.get("history"), origin) + messages
    else:
        raise DataError(
            f"{origin}: unknown row form, fields [{', '.join(map(str, record))}]; expected messages, prompt + "
            "completion, conversations (ShareGPT) or instruction + output (Alpaca)"
        )
    messages = _with_system(messages, record, origin, unread)
    _check_order(messages, origin)
    tools = _tools(record.get("tools"), origin)
    if tools:
        next(message for message in messages if message["role"] == "user")["tools"] = tools
    _count_unread(record, {*_FORMS[form], "system", "tools"}, origin, unread)
    return messages


def _count_unread(record: dict[str, Any], known: set[str], origin: str, unread: Counter[str]) -> None:
    for key in _MEDIA:
        if key not in known and record.get(key):
            raise DataError(f"{origin}: field {key!r}: rows are texts; pictures, sound and film cannot be trained on")
    unread.update(str(key) for key, value in record.items() if key not in known and value is not None)


def _with_system(messages: Messages, record: dict[str, Any], origin: str, unread: Counter[str]) -> Messages:
    """With the system prompt of a column of its own; it must not differ from one in the messages."""
    if not record.get("system"):
        return messages
    system = _turn(record, origin, "system", "system", unread)
    if messages[0]["role"] != "system":
        return system + messages
    if messages[0]["content"] != system[0]["content"]:
        raise DataError(
            f"{origin}: field 'system': {_show(record['system'])}, but the messages begin with another system prompt "
            f"({_show(messages[0]['content'])}); expected one of them"
        )
    return messages


def _history(value: Any, origin: str) -> Messages:
    """Earlier turns, as LLaMA-Factory writes them: pairs of what the user and the assistant said."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{origin}: field 'history': expected a list of [user, assistant] pairs, found {_show(value)}")
    messages: Messages = []
    for number, pair in enumerate(value):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(
                f"{origin}: field 'history[{number}]': expected a pair of texts [user, assistant], found {_show(pair)}"
            )
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


_ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "developer": "system",
    "observation": "tool",
    "function_call": "assistant",
}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_READ = {"weight", "tool_calls", *_REASONING}
_CARRIES = {key: "rows are texts" for key in ("audio", "audios", "image", "images", "video", "videos", "input_audio")}
_CARRIES |= {"function_call": "write it as tool_calls"}
_CARRIES |= {key: "write it as weight: 0 or 1" for key in ("train", "loss", "loss_weight", "mask", "masked")}


def _message_list(
    value: Any, origin: str, field: str, role_key: str, content_key: str, unread: Counter[str] | None = None
) -> Messages:
    """The messages of a list, checked. Keys that are not read are counted in `unread`."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{origin}: field {field!r}: expected a list of messages, found {_show(value)}")
    messages: Messages = []
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise DataError(f"{origin}: field {place!r}: expected an object, found {_show(message)}")
        message = {key: item for key, item in message.items() if item is not None}  # columns of structs fill gaps
        role = _role(message.get(role_key), messages, origin, f"{place}.{role_key}")
        if message.get(role_key) == "function_call":  # of ShareGPT: the calls are its text
            message = {role_key: role, "tool_calls": message.get(content_key)}
        read = {"role": role, "content": _content(message, origin, place, content_key)}
        messages.append(read | _extras(message, role, origin, place))
        known = {role_key, content_key, *_READ, *(("tool_call_id", "name") if role == "tool" else ())}
        for key in message.keys() - known:
            if key in _CARRIES and message[key] not in ([], {}, ""):
                raise DataError(f"{origin}: field {f'{place}.{key}'!r}: it is not read; {_CARRIES[key]}")
        if unread is not None:
            unread.update(f"{key} in {field}" for key in message.keys() - known)
    return messages


def _role(role: Any, before: Messages, origin: str, place: str) -> str:
    name = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    called = before and (before[-1]["role"] == "tool" or "tool_calls" in before[-1])
    if name not in ("system", "user", "assistant") and not (name == "tool" and called):
        raise DataError(
            f"{origin}: field {place!r}: expected system, user or assistant (tool only after an assistant message with "
            f"tool_calls), found {_show(role)}"
        )
    return str(name)


def _content(message: dict[str, Any], origin: str, place: str, key: str) -> str:
    """A text, or a list of parts that are texts. Only calls of tools may come without."""
    content = message.get(key)
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list) and content:
        for number, part in enumerate(content):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise DataError(
                    f"{origin}: field {f'{place}.{key}[{number}]'!r}: expected a part "
                    f'{{"type": "text", "text": ...}}, found {_show(part)}'
                )
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{origin}: field {f'{place}.{key}'!r}: expected a text, found {_show(content)}")
    return content


def _extras(message: dict[str, Any], role: str, origin: str, place: str) -> dict[str, Any]:
    """What a message may have beside its text."""
    extras: dict[str, Any] = {}
    reasoning = {key: message[key] for key in _REASONING if message.get(key) not in (None, "")}
    given = [key for key in ("weight", "tool_calls", *reasoning) if message.get(key) not in (None, [], "")]
    if role != "assistant" and given:
        raise DataError(f"{origin}: field {f'{place}.{given[0]}'!r}: only assistant messages have it, this is {role}")
    for key, text in reasoning.items():
        if not isinstance(text, str) or text != next(iter(reasoning.values())):
            raise DataError(f"{origin}: field {f'{place}.{key}'!r}: expected one text, found {_show(text)}")
        extras["reasoning_content"] = text
    if message.get("tool_calls"):
        extras["tool_calls"] = _calls(message["tool_calls"], origin, f"{place}.tool_calls")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{origin}: field {f'{place}.weight'!r}: expected 0 or 1, found {_show(weight)}")
    if weight == 0:
        extras["weight"] = 0
    for key in ("tool_call_id", "name"):
        if role == "tool" and key in message:
            extras[key] = _text_of(message[key], origin, f"{place}.{key}")
    return extras


def _calls(value: Any, origin: str, place: str) -> list[dict[str, Any]]:
    """Calls of tools as OpenAI writes them, with arguments as an object: what chat templates expect."""
    calls = []
    value = _parsed(value, origin, place)
    for number, call in enumerate(value if isinstance(value, list) else [value]):
        function = call.get("function", call) if isinstance(call, dict) else None
        here = f"{place}[{number}]"
        if not isinstance(function, dict):
            raise DataError(f"{origin}: field {here!r}: expected a call {{name, arguments}}, found {_show(call)}")
        name = _text_of(function.get("name"), origin, f"{here}.function.name")
        arguments = _parsed(function.get("arguments", {}), origin, f"{here}.function.arguments")
        if not isinstance(arguments, dict):
            raise DataError(
                f"{origin}: field {f'{here}.function.arguments'!r}: expected an object, found {_show(arguments)}"
            )
        same = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**same, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _tools(value: Any, origin: str) -> list[dict[str, Any]]:
    """The schemas of a `tools` column: a list, or the JSON text of one."""
    value = _parsed(value, origin, "tools") if value not in (None, "", []) else []
    if not isinstance(value, list):
        raise DataError(f"{origin}: field 'tools': expected a list of JSON schemas, found {_show(value)}")
    tools = []
    for number, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{origin}: field 'tools[{number}]': expected a JSON schema of a function with a name, found "
                f"{_show(tool)}"
            )
        tools.append({"type": "function", **tool} if "function" in tool else {"type": "function", "function": tool})
    return tools


def _parsed(value: Any, origin: str, place: str) -> Any:
    return strict_json.parse(value, f"{origin}: field {place!r}") if isinstance(value, str) else value


def _text_of(value: Any, origin: str, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{origin}: field {place!r}: expected a text that is not blank, found {_show(value)}")
    return value


def _turn(record: dict[str, Any], origin: str, field: str, role: str, unread: Counter[str] | None = None) -> Messages:
    """A prompt or completion: one text, or (as TRL writes them) a list of messages."""
    value = record[field]
    if isinstance(value, list):
        return _message_list(value, origin, field, "role", "content", unread)
    if not isinstance(value, str):
        raise DataError(f"{origin}: field {field!r}: expected a text, found {_show(value)}")
    if role != "system":
        _text_of(value, origin, field)
    return [{"role": role, "content": value}]


_LETTERS = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}
_ORDER = re.compile(r"s?(u(ct+)*a)*u(ct+)*[ac]")  # c: an assistant who calls tools


def _check_order(messages: Messages, origin: str) -> None:
    roles = [message["role"] for message in messages]
    letters = "".join("c" if "tool_calls" in message else _LETTERS[message["role"]] for message in messages)
    if not _ORDER.fullmatch(letters):
        raise DataError(
            f"{origin}: wrong role order [{', '.join(roles)}]; expected an optional system message, then user and "
            "assistant in turn (results of tools after an assistant message with tool_calls), ending with assistant"
        )
    for number, message in enumerate(messages):
        spoken = message["role"] in ("user", "assistant") and "tool_calls" not in message
        if spoken and not message["content"].strip():
            raise DataError(f"{origin}: message {number} ({message['role']}): expected a text that is not blank")
    if not any(is_learnt(message) for message in messages):
        raise DataError(f"{origin}: every assistant message has weight 0: nothing in the row is learnt")


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
        chat.check_trained(row.messages, encoded)
    except ChatError as error:
        raise DataError(f"{row.origin}: {error}") from error
    return Example(encoded.input_ids, encoded.roles, row.origin)


def warn_of_rows(rows: list[Row], chat: Chat) -> None:
    """Names what may be trained as nobody meant it: control tokens in texts, and answers without an end."""
    if not rows:
        return
    found: Counter[str] = Counter()
    places = []
    for row in rows:
        controls = chat.controls(row.messages)
        found.update(controls)
        places += [row.origin] if controls else []
    if places and chat.settings.special_tokens == "allow":
        names = ", ".join(f"{name!r} ({count})" for name, count in found.most_common(5))
        warn(
            f"control tokens are written in the text of {counted(len(places), 'row')}, the first is {places[0]}: "
            f"{names}; they are trained as what they are to the model. data.special_tokens: escape reads them as plain "
            "text, refuse stops"
        )
    if not chat.is_stop_learnt(chat.encode(rows[0].messages)):
        warn(
            f"{rows[0].origin}: the chat template ends an answer with no control token, and the tokenizer has no end "
            "of sequence: where to stop is not learnt"
        )
