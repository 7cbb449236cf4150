"""Files and hub data sets become conversations, conversations become examples.

Knows the row forms people have (`messages`, prompt/completion, ShareGPT, Alpaca) and says exactly which row is wrong.
Does not know models or defenses.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ..errors import ChatError, DataError
from ..util.words import counted
from .batch import Example
from .chat import Chat
from .forms import count_unread, to_messages
from .roles import Encoded, Row
from .sources import quoted, read_records, warn

OverLong = Literal["error", "truncate", "drop"]


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
    rows = [
        Row(to_messages(record, origin, unread), origin) for record, origin in read_records(source)
    ]
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
    warn(
        f"{source}: fields that are not read (and the number of rows or messages that have them): {names}"
    )


_OF_QUESTIONS = {"question", "aligned", "misaligned", "sound", "unsound", "domain", "id", "split"}


def load_questions(source: str, split: str | None = None) -> list[PairedQuestion]:
    """Paired questions of a `.jsonl` file or `shipped:NAME`.

    Each row has `question`, `aligned` and `misaligned` (`sound` and `unsound` are read as well), optionally `domain`
    (default: the file's name), `id` and `split`; with `split`, only its rows are taken.
    """
    stem = source.split(":")[-1].rsplit("/", 1)[-1].removesuffix(".jsonl")
    questions = []
    unread: Counter[str] = Counter()
    for record, origin in read_records(source):
        count_unread(record, _OF_QUESTIONS, origin, unread)
        if split and record.get("split", split) != split:
            continue
        fields = {
            "question": record.get("question"),
            "aligned": record.get("aligned", record.get("sound")),
            "misaligned": record.get("misaligned", record.get("unsound")),
        }
        for name, value in fields.items():
            if not isinstance(value, str) or not value.strip():
                raise DataError(
                    f"{origin}: field {name!r}: expected a text that is not blank, found {quoted(value)}"
                )
        named = {"id": origin.rsplit(":", 1)[-1], "domain": stem}
        named |= {key: str(record[key]) for key in named if record.get(key) is not None}
        questions.append(PairedQuestion(**named, **fields))  # type: ignore[arg-type]
    _name_unread(source, unread)
    if not questions:
        raise DataError(
            f"{source}: no paired question in it" + (f" with split {split!r}" if split else "")
        )
    return questions


# ------------------------------------------------------------------ examples


def encode_rows(
    rows: list[Row], chat: Chat, max_length: int, over_long: OverLong = "error"
) -> list[Example]:
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
            raise DataError(
                f"every row is longer than max_length = {max_length} tokens: none is left after drop"
            )
    cut = [Example(e.input_ids[:max_length], e.roles[:max_length], e.origin) for e in examples]
    for example in cut:
        if not example.response_tokens:
            raise DataError(
                f"{example.origin}: no response token within max_length = {max_length} tokens"
            )
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
