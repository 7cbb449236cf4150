"""The tokens of a rendered conversation and their roles, for `chat`. Knows a tokenizer and where
contents are; does not know templates.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ChatError, first_line
from .roles import Encoded, Messages, Role, Span, is_learnt

# Private characters around a control token that is to be read as plain text.
_OPEN, _CLOSE = "\uf8f0", "\uf8f1"
Tokens = tuple[list[int], list[Span]]  # ids, and the characters of each


@dataclass(frozen=True)
class ContentPlace:
    """Characters of a content; `closed`: they include the text that ends its turn."""

    start: int
    end: int
    closed: bool = False


@dataclass(frozen=True)
class Stops:
    """Control tokens of a tokenizer, and the one that ends a sequence."""

    special_ids: Set[int]
    eos_id: int | None


def tokens_of(tokenizer: Any, text: str) -> Tokens:
    """Ids and places of the tokens; marked text is read as plain text."""
    ids: list[int] = []
    offsets: list[Span] = []
    start, plain = 0, {}
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if piece in (_OPEN, _CLOSE):
            plain = {"split_special_tokens": True} if piece == _OPEN else {}
        elif piece:
            try:
                found = tokenizer(
                    piece, add_special_tokens=False, return_offsets_mapping=True, **plain
                )
            # Half of a surrogate pair, a damaged config.
            except (TypeError, ValueError, OverflowError) as error:
                raise ChatError(f"the tokenizer refuses a text: {first_line(error)}") from error
            ids += found["input_ids"]
            offsets += [(left + start, right + start) for left, right in found["offset_mapping"]]
        start += len(piece)
    return ids, offsets


def tokens_before_answer(tokenizer: Any, text: str) -> Tokens:
    """Tokens of a prompt as they are when an answer follows: some tokenizers join line ends only at
    the end."""
    ids, offsets = tokens_of(tokenizer, text + "A")
    kept = sum(right <= len(text) for _, right in offsets)
    whole = kept and offsets[kept - 1][1] == len(text)
    return (ids[:kept], offsets[:kept]) if whole else tokens_of(tokenizer, text)


def char_roles(
    messages: Messages, text: str, places: dict[int, ContentPlace], tokens: Tokens, stops: Stops
) -> list[Role]:
    """One role per character, including gaps between contents."""
    first_user = min(place.start for place in places.values())
    roles = [Role.PREFIX if place < first_user else Role.TEMPLATE for place in range(len(text))]
    previous_end = 0
    for number, place in places.items():
        start, end = place.start, place.end
        if is_learnt(messages[number]):
            roles[previous_end:start] = [Role.POSTFIX] * (start - previous_end)
            later = (places[other].start for other in places if other > number)
            next_start = next(later, len(text))
            end = end if place.closed else _turn_end(text, end, next_start, tokens, stops)
            roles[start:end] = [Role.RESPONSE] * (end - start)
        else:
            roles[start:end] = [Role.QUERY] * (end - start)
        previous_end = end
    if messages[-1]["role"] in ("user", "tool"):
        roles[previous_end:] = [Role.POSTFIX] * (len(text) - previous_end)
    return roles


def _turn_end(text: str, start: int, stop: int, tokens: Tokens, stops: Stops) -> int:
    """End of what closes a response: up to the end-of-sequence token if special tokens lead there,
    else the first special token, else the first marker or word of template text."""
    first_special = None
    for token, (left, right) in zip(*tokens):
        if left < start < right and token in stops.special_ids:
            return right
        if left < start or right > stop:
            continue
        if token in stops.special_ids:
            first_special = first_special or right
            if token == stops.eos_id:
                return right
        elif text[left:right].strip():
            break
    if first_special:
        return first_special
    plain_marker = re.compile(r"\s*(<[^>]*>|\[[^\]]*\]|\S+)").match(text, start, stop)
    return plain_marker.end() if plain_marker else start


def token_role(roles: list[Role], start: int, end: int) -> Role:
    """Content wins over template text; of two contents the later one wins."""
    inside = roles[start:end] or roles[start : start + 1] or roles[-1:]
    for role in reversed(inside):
        if role in (Role.QUERY, Role.RESPONSE):
            return role
    return inside[0]


# ------------------------------------------------------------------ control tokens in texts


def marked(value: Any, controls: re.Pattern[str]) -> Any:
    """A value with marks around every control token in its texts."""
    if isinstance(value, str):
        return controls.sub(f"{_OPEN}\\g<0>{_CLOSE}", value.replace(_OPEN, "").replace(_CLOSE, ""))
    if isinstance(value, Mapping):
        return {
            key: item if key == "role" else marked(item, controls) for key, item in value.items()
        }
    return [marked(item, controls) for item in value] if isinstance(value, list) else value


def unmarked(encoded: Encoded) -> Encoded:
    """Without the marks around control tokens."""
    if _OPEN not in encoded.text:
        return encoded
    clean = [0]
    for letter in encoded.text:
        clean.append(clean[-1] + (letter not in (_OPEN, _CLOSE)))
    text = encoded.text.replace(_OPEN, "").replace(_CLOSE, "")
    offsets = [(clean[left], clean[right]) for left, right in encoded.offsets]
    spans = {number: (clean[left], clean[right]) for number, (left, right) in encoded.spans.items()}
    return replace(encoded, text=text, offsets=offsets, spans=spans)
