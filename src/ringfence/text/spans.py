"""Helpers of `chat` for messages and rendered text: marks, spans that grow."""

import secrets
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from ..errors import ChatError
from .roles import Messages


def has_extras(message: dict[str, Any]) -> bool:
    return "tool_calls" in message or "reasoning_content" in message


def check_messages(messages: Messages, generation: bool) -> None:
    for number, message in enumerate(messages):
        if message["role"] not in ("system", "user", "assistant", "tool"):
            raise ChatError(
                f"message {number}: role {message['role']!r} (accepted: system, user, assistant, "
                "tool)"
            )
    speakers = [message["role"] for message in messages if message["role"] != "system"]
    if speakers[:1] != ["user"]:
        raise ChatError("a conversation needs a user who speaks first")
    if generation and messages[-1]["role"] not in ("user", "tool"):
        raise ChatError("a generation prompt needs a conversation that ends with a user message")
    for number, message in enumerate(messages):
        spoken = message["role"] in ("user", "assistant") and "tool_calls" not in message
        if spoken and not message["content"].strip():
            raise ChatError(f"message {number} ({message['role']}): it is blank")


def new_mark() -> str:
    return "x" + secrets.token_hex(12)


def common_start(one: str, other: str) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def squeezed(text: str) -> str:
    return "".join(text.split())


def with_content(messages: Messages, number: int, content: str) -> Messages:
    return [{**m, "content": content} if n == number else m for n, m in enumerate(messages)]


def texts_in(value: Any) -> Iterator[str]:
    """Every text in messages except their roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from () if key == "role" else texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def grow_left(text: str, content: str, cut: int, place: int) -> int:
    while cut > 0 and place > 0 and content[cut - 1] == text[place - 1]:
        cut, place = cut - 1, place - 1
    return place


def grow_right(text: str, content: str, cut: int, place: int) -> int:
    while cut < len(content) and place < len(text) and content[cut] == text[place]:
        cut, place = cut + 1, place + 1
    return place
