"""What a server sent: a reply, or why there is none, in one line.

Knows the bodies of OpenAI-compatible servers; does not know how they are asked.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: the completion, or the model's refusal; None with `error`.
        finished: it ended by itself, not at the token limit.
        top: for each generated token, log-probability by token text; empty if the server gives
            none.
        error: why there is no text, after all attempts.
        adapted: how the request sent differed: `without temperature`, `max_tokens 4096`.
    """

    text: str | None
    finished: bool = False
    top: list[dict[str, float]] = field(default_factory=list)
    error: str | None = None
    adapted: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Failure:
    """Why a try gave no reply.

    Attributes:
        words: in one line, without keys.
        status: of HTTP, or of an error in a reply's body.
        code: the server's name for it.
        passes: another try may succeed.
        tries: number of tries; 0 = only one, because more are useless.
        eaten: reasoning used up all tokens.
        cause: name of the exception below, if no server answered.
    """

    words: str
    status: int | None = None
    code: str | None = None
    passes: bool = False
    tries: int = 0
    eaten: bool = False
    cause: str = ""


class NoReply(Exception):
    """A body of JSON without a reply."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


def read_reply(body: Any) -> Reply:
    """The reply in a completion's JSON.

    Raises:
        NoReply: it contains an error, or nothing.
    """
    refuse_error(body)
    choices = _field(body, "the reply", "choices", list)
    if not choices:
        raise _unreadable("choices: expected one, found none")
    choice = choices[0]
    if isinstance(choice, dict):
        refuse_error(choice, "message")
    message = _field(choice, "choices.0", "message", dict)
    text, reason = _text(message.get("content")), choice.get("finish_reason")
    if not text and isinstance(message.get("refusal"), str) and message["refusal"]:
        text = message["refusal"]
    if not text:
        _explain_silence(text, reason, message, body)
    assert text is not None
    try:
        tokens = (choice.get("logprobs") or {})["content"]
        top = [merged(token["top_logprobs"] or [token]) for token in tokens]
    except (ValueError, LookupError, TypeError, AttributeError):
        top = []
    return Reply(text, reason in _ENDS, top)


_ENDS = ("stop", "eos", "eos_token", "stop_sequence", "end_turn")


def _explain_silence(
    text: str | None, reason: Any, message: dict[str, Any], body: dict[str, Any]
) -> None:
    """Raises why there is no text, unless the model ended its turn or was cut off."""
    if reason == "content_filter":
        withheld = "the server's content filter withheld the reply"
        raise NoReply(Failure(f"{withheld} (finish_reason 'content_filter')"))
    thoughts = [message.get(name) for name in ("reasoning", "reasoning_content", "thinking")]
    if reason == "length" and (text is None or any(thoughts) or _reasoning(body)):
        used_up = "no content: reasoning used up all tokens of the reply before the answer began"
        how = "(finish_reason 'length'); set max_tokens higher"
        raise NoReply(Failure(f"{used_up} {how}", eaten=True))
    if message.get("tool_calls"):
        raise NoReply(Failure("no content: the model calls a tool instead of answering"))
    if text is None or reason not in (*_ENDS, "length"):
        raise NoReply(Failure(f"no content, finish_reason {reason!r}", passes=True))


def _reasoning(body: dict[str, Any]) -> bool:
    """Whether the server counted reasoning tokens."""
    try:
        return body["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    except (LookupError, TypeError):
        return False


def _text(content: Any) -> str | None:
    """The text of a message's content; for a list of parts, of its text parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _unreadable(
            f"message.content: expected a text, found {type(content).__name__} {content!r}"
        )
    texts = [
        part if isinstance(part, str) else part.get("text")
        for part in content
        if isinstance(part, (str, dict))
    ]
    found = [text for text in texts if isinstance(text, str)]
    return "".join(found) if found else None


def _field(value: Any, where: str, name: str, kind: type) -> Any:
    if not isinstance(value, dict):
        raise _unreadable(f"{where}: expected an object, found {type(value).__name__}")
    if not isinstance(value.get(name), kind):
        fields = ", ".join(map(str, value))
        found = type(value[name]).__name__ if name in value else f"no such field ({fields})"
        raise _unreadable(f"{where}: {name}: expected {kind.__name__}, found {found}")
    return value[name]


def _unreadable(words: str) -> NoReply:
    return NoReply(Failure(f"a reply that cannot be read: {words}", passes=True))


_STATUS = {
    "invalid_request_error": 400,
    "badrequesterror": 400,
    "context_length_exceeded": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "model_not_found": 404,
    "not_found_error": 404,
    "notfounderror": 404,
}


def refuse_error(body: Any, unless: str = "choices") -> None:
    """Raises the error in a body with status 200, as if the reply had the status it names."""
    if not isinstance(body, dict):
        return
    error = body.get("error")
    if not error:
        if body.get(unless) or not ("detail" in body or body.get("object") == "error"):
            return
        error = body
    named = error if isinstance(error, dict) else {}
    code, kind = named.get("code"), named.get("type")
    numbers = (str(number) for number in (code, named.get("status")))
    status = next((int(number) for number in numbers if re.fullmatch(r"[345]\d\d", number)), None)
    names = (str(name).lower() for name in (code, kind))
    status = status or next((_STATUS[name] for name in names if name in _STATUS), None)
    passes = status is None or status in (408, 409, 429) or status >= 500
    words = f"{'error' if status is None else f'error {status}'} in a reply: {message_of(error)}"
    raise NoReply(Failure(words, status, str(code), passes))


def message_of(error: Any) -> str:
    """A server's own words, from any of the usual places."""
    for name in ("message", "error", "detail", "msg", "error_description"):
        if isinstance(error, dict) and error.get(name):
            return message_of(error[name])
    return error if isinstance(error, str) else "" if error is None else repr(error)


def merged(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Log-probability by token text. Tokens with the same text (`9` and the byte of `9`) add up."""
    top: dict[str, float] = {}
    for entry in entries:
        if not entry["logprob"] < 0.01:  # NaN too
            raise ValueError(f"no log-probability: {entry['logprob']}")
        before = top.get(entry["token"], -np.inf)
        top[entry["token"]] = float(np.logaddexp(before, entry["logprob"]))
    return top
