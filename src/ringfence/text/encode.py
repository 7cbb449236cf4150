"""Rows become examples: token ids with one role per token.

Does not know models or training.
"""

from collections import Counter
from typing import Literal

from ..errors import ChatError, DataError
from ..util.words import counted
from .batch import Example
from .chat import Chat
from .roles import Encoded, Row
from .sources import warn

OverLong = Literal["error", "truncate", "drop"]


def encode_rows(
    rows: list[Row], chat: Chat, max_length: int, over_long: OverLong = "error"
) -> list[Example]:
    """Token ids and roles of every row.

    Rows longer than `max_length` tokens stop the run (`error`), lose their end (`truncate`) or are
    left out (`drop`).

    Raises:
        DataError: a row cannot be rendered, is over-long, or keeps no response token.
    """
    examples = [_encode_row(row, chat) for row in rows]
    long = [example for example in examples if len(example) > max_length]
    if long and over_long == "error":
        first = long[0]
        raise DataError(
            f"{len(long)} of {len(examples)} rows are longer than max_length = {max_length} "
            f"tokens, the first is {first.origin} with {len(first)}; raise data.max_length or set "
            "data.over_long to truncate or drop"
        )
    if over_long == "drop":
        examples = [example for example in examples if len(example) <= max_length]
        if not examples:
            raise DataError(
                f"every row is longer than max_length = {max_length} tokens: none is left after "
                "drop"
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
    """Warns of what may be trained by accident: control tokens in texts, and answers without an
    end."""
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
            f"control tokens are written in the text of {counted(len(places), 'row')}, the first "
            f"is {places[0]}: {names}; the model is trained on them as control tokens. "
            "data.special_tokens: escape reads them as plain text, refuse stops"
        )
    if not chat.is_stop_learnt(chat.encode(rows[0].messages)):
        warn(
            f"{rows[0].origin}: the chat template ends an answer with no control token, and the "
            "tokenizer has no end-of-sequence token: where to stop is not learnt"
        )
