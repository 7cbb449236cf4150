"""Turns the row forms in use (`messages`, prompt/completion, ShareGPT, Alpaca) into messages; a
record that fits none of them is refused by field.
"""

import re
from collections import Counter
from typing import Any

from ..errors import DataError
from ..util import strict_json
from .roles import Messages, is_learnt
from .sources import quoted

_FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output", "input", "history"),
}
_MEDIA = ("images", "image", "audios", "audio", "videos", "video")


def to_messages(record: dict[str, Any], origin: str, unread: Counter[str]) -> Messages:
    if "messages" in record:
        form = "messages"
        messages = message_list(record["messages"], origin, "messages", "role", "content", unread)
    elif "conversations" in record:
        form = "conversations"
        messages = message_list(
            record["conversations"], origin, "conversations", "from", "value", unread
        )
    elif "prompt" in record and "completion" in record:
        form = "prompt"
        messages = _turn(record, origin, "prompt", "user", unread)
        messages += _turn(record, origin, "completion", "assistant", unread)
    elif "instruction" in record and "output" in record:
        form = "instruction"
        messages = _turn(record, origin, "instruction", "user", unread)
        messages += _turn(record, origin, "output", "assistant", unread)
        if str(record.get("input") or "").strip():
            messages[-2]["content"] += (
                "\n\n" + _turn(record, origin, "input", "user", unread)[-1]["content"]
            )
        messages = _history(record.get("history"), origin) + messages
    else:
        raise DataError(
            f"{origin}: unknown row form, fields [{', '.join(map(str, record))}]; expected "
            "messages, prompt + completion, conversations (ShareGPT) or instruction + output "
            "(Alpaca)"
        )
    messages = _with_system(messages, record, origin, unread)
    _check_order(messages, origin)
    tools = _tools(record.get("tools"), origin)
    if tools:
        next(message for message in messages if message["role"] == "user")["tools"] = tools
    count_unread(record, {*_FORMS[form], "system", "tools"}, origin, unread)
    return messages


def count_unread(
    record: dict[str, Any], known: set[str], origin: str, unread: Counter[str]
) -> None:
    for key in _MEDIA:
        if key not in known and record.get(key):
            raise DataError(
                f"{origin}: field {key!r}: rows are texts; images, audio and video cannot be "
                "trained on"
            )
    unread.update(
        str(key) for key, value in record.items() if key not in known and value is not None
    )


def _with_system(
    messages: Messages, record: dict[str, Any], origin: str, unread: Counter[str]
) -> Messages:
    """With the system prompt of its own column, which must not differ from one in the messages."""
    if not record.get("system"):
        return messages
    system = _turn(record, origin, "system", "system", unread)
    if messages[0]["role"] != "system":
        return system + messages
    if messages[0]["content"] != system[0]["content"]:
        raise DataError(
            f"{origin}: field 'system': {quoted(record['system'])}, but the messages begin with "
            f"another system prompt ({quoted(messages[0]['content'])}); expected one of them"
        )
    return messages


def _history(value: Any, origin: str) -> Messages:
    """Earlier turns as LLaMA-Factory writes them: pairs of what the user and the assistant said."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(
            f"{origin}: field 'history': expected a list of [user, assistant] pairs, found "
            f"{quoted(value)}"
        )
    messages: Messages = []
    for number, pair in enumerate(value):
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(text, str) for text in pair)
        ):
            raise DataError(
                f"{origin}: field 'history[{number}]': expected a pair of texts [user, assistant], "
                f"found {quoted(pair)}"
            )
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
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
_CARRIES = {
    key: "rows are texts"
    for key in ("audio", "audios", "image", "images", "video", "videos", "input_audio")
}
_CARRIES |= {"function_call": "write it as tool_calls"}
_CARRIES |= {
    key: "write it as weight: 0 or 1" for key in ("train", "loss", "loss_weight", "mask", "masked")
}


def message_list(
    value: Any,
    origin: str,
    field: str,
    role_key: str,
    content_key: str,
    unread: Counter[str] | None = None,
) -> Messages:
    """The messages of a list, checked. Keys that are not read are counted in `unread`."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{origin}: field {field!r}: expected a list of messages, found {quoted(value)}"
        )
    messages: Messages = []
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise DataError(
                f"{origin}: field {place!r}: expected an object, found {quoted(message)}"
            )
        # Columns of structs fill gaps with None.
        message = {key: item for key, item in message.items() if item is not None}
        role = _role(message.get(role_key), messages, origin, f"{place}.{role_key}")
        if message.get(role_key) == "function_call":  # of ShareGPT: the calls are its text
            message = {role_key: role, "tool_calls": message.get(content_key)}
        read = {"role": role, "content": _content(message, origin, place, content_key)}
        messages.append(read | _extras(message, role, origin, place))
        known = {
            role_key,
            content_key,
            *_READ,
            *(("tool_call_id", "name") if role == "tool" else ()),
        }
        for key in message.keys() - known:
            if key in _CARRIES and message[key] not in ([], {}, ""):
                raise DataError(
                    f"{origin}: field {f'{place}.{key}'!r}: it is not read; {_CARRIES[key]}"
                )
        if unread is not None:
            unread.update(f"{key} in {field}" for key in message.keys() - known)
    return messages


def _role(role: Any, before: Messages, origin: str, place: str) -> str:
    name = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    called = before and (before[-1]["role"] == "tool" or "tool_calls" in before[-1])
    if name not in ("system", "user", "assistant") and not (name == "tool" and called):
        raise DataError(
            f"{origin}: field {place!r}: expected system, user or assistant (tool only after an "
            f"assistant message with tool_calls), found {quoted(role)}"
        )
    return str(name)


def _content(message: dict[str, Any], origin: str, place: str, key: str) -> str:
    """A text, or a list of text parts. Only tool calls may come without one."""
    content = message.get(key)
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list) and content:
        for number, part in enumerate(content):
            if not (
                isinstance(part, dict)
                and part.get("type") == "text"
                and isinstance(part.get("text"), str)
            ):
                raise DataError(
                    f"{origin}: field {f'{place}.{key}[{number}]'!r}: expected a part "
                    f'{{"type": "text", "text": ...}}, found {quoted(part)}'
                )
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(
            f"{origin}: field {f'{place}.{key}'!r}: expected a text, found {quoted(content)}"
        )
    return content


def _extras(message: dict[str, Any], role: str, origin: str, place: str) -> dict[str, Any]:
    """What a message may have besides its text."""
    extras: dict[str, Any] = {}
    reasoning = {key: message[key] for key in _REASONING if message.get(key) not in (None, "")}
    given = [
        key
        for key in ("weight", "tool_calls", *reasoning)
        if message.get(key) not in (None, [], "")
    ]
    if role != "assistant" and given:
        raise DataError(
            f"{origin}: field {f'{place}.{given[0]}'!r}: only assistant messages have it, this is "
            f"{role}"
        )
    for key, text in reasoning.items():
        if not isinstance(text, str) or text != next(iter(reasoning.values())):
            raise DataError(
                f"{origin}: field {f'{place}.{key}'!r}: expected one text, found {quoted(text)}"
            )
        extras["reasoning_content"] = text
    if message.get("tool_calls"):
        extras["tool_calls"] = _calls(message["tool_calls"], origin, f"{place}.tool_calls")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(
            f"{origin}: field {f'{place}.weight'!r}: expected 0 or 1, found {quoted(weight)}"
        )
    if weight == 0:
        extras["weight"] = 0
    for key in ("tool_call_id", "name"):
        if role == "tool" and key in message:
            extras[key] = text_of(message[key], origin, f"{place}.{key}")
    return extras


def _calls(value: Any, origin: str, place: str) -> list[dict[str, Any]]:
    """Tool calls as OpenAI writes them, with arguments as an object: what chat templates expect."""
    calls = []
    value = _parsed(value, origin, place)
    for number, call in enumerate(value if isinstance(value, list) else [value]):
        function = call.get("function", call) if isinstance(call, dict) else None
        here = f"{place}[{number}]"
        if not isinstance(function, dict):
            raise DataError(
                f"{origin}: field {here!r}: expected a call {{name, arguments}}, found "
                f"{quoted(call)}"
            )
        name = text_of(function.get("name"), origin, f"{here}.function.name")
        arguments = _parsed(function.get("arguments", {}), origin, f"{here}.function.arguments")
        if not isinstance(arguments, dict):
            raise DataError(
                f"{origin}: field {f'{here}.function.arguments'!r}: expected an object, found "
                f"{quoted(arguments)}"
            )
        same = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append(
            {**same, "type": "function", "function": {"name": name, "arguments": arguments}}
        )
    return calls


def _tools(value: Any, origin: str) -> list[dict[str, Any]]:
    """The schemas of a `tools` column: a list, or the JSON text of one."""
    value = _parsed(value, origin, "tools") if value not in (None, "", []) else []
    if not isinstance(value, list):
        raise DataError(
            f"{origin}: field 'tools': expected a list of JSON schemas, found {quoted(value)}"
        )
    tools = []
    for number, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{origin}: field 'tools[{number}]': expected a JSON schema of a function with a "
                f"name, found {quoted(tool)}"
            )
        tools.append({"type": "function", **(tool if "function" in tool else {"function": tool})})
    return tools


def _parsed(value: Any, origin: str, place: str) -> Any:
    if not isinstance(value, str):
        return value
    return strict_json.parse(value, f"{origin}: field {place!r}")


def text_of(value: Any, origin: str, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{origin}: field {place!r}: expected a text that is not blank, found {quoted(value)}"
        )
    return value


def _turn(
    record: dict[str, Any], origin: str, field: str, role: str, unread: Counter[str] | None = None
) -> Messages:
    """A prompt or completion: one text, or (as TRL writes them) a list of messages."""
    value = record[field]
    if isinstance(value, list):
        return message_list(value, origin, field, "role", "content", unread)
    if not isinstance(value, str):
        raise DataError(f"{origin}: field {field!r}: expected a text, found {quoted(value)}")
    if role != "system":
        text_of(value, origin, field)
    return [{"role": role, "content": value}]


_LETTERS = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}
_ORDER = re.compile(r"s?(u(ct+)*a)*u(ct+)*[ac]")  # c: an assistant that calls tools


def _check_order(messages: Messages, origin: str) -> None:
    roles = [message["role"] for message in messages]
    letters = "".join(
        "c" if "tool_calls" in message else _LETTERS[message["role"]] for message in messages
    )
    if not _ORDER.fullmatch(letters):
        raise DataError(
            f"{origin}: wrong role order [{', '.join(roles)}]; expected an optional system "
            "message, then user and assistant in turn (results of tools after an assistant message "
            "with tool_calls), ending with assistant"
        )
    for number, message in enumerate(messages):
        spoken = message["role"] in ("user", "assistant") and "tool_calls" not in message
        if spoken and not message["content"].strip():
            raise DataError(
                f"{origin}: message {number} ({message['role']}): expected a text that is not blank"
            )
    if not any(is_learnt(message) for message in messages):
        raise DataError(
            f"{origin}: every assistant message has weight 0: nothing in the row is learnt"
        )
