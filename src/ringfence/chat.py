"""A conversation becomes token ids and one role per token. The only place that knows chat templates.

The roles of a rendered conversation (arXiv 2606.06667):

    prefix    everything before the first user content (markers, system prompt)
    query     every user content
    postfix   template text that stands before a response
    response  every assistant content and the token(s) that end its turn
    template  template text anywhere else

Where a content stands in the rendered text is never searched for. Each content in turn is replaced by a sentinel, the
template is rendered again, and the text around the sentinel gives the span. So what a user writes (the word
"assistant", a template's own markers, an empty system prompt) cannot move a role.

This module does not know models, losses or padding.
"""

import re
import secrets
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import jinja2

from .errors import ChatError

Messages = list[dict[str, str]]
Span = tuple[int, int]


class Role(IntEnum):
    """The role of one token. PAD is given by the collator, never by a template."""

    PAD = 0
    PREFIX = 1
    QUERY = 2
    POSTFIX = 3
    RESPONSE = 4
    TEMPLATE = 5

    @classmethod
    def parse(cls, name: str) -> "Role":
        return cls[name.upper()]


@dataclass(frozen=True)
class Encoded:
    """A rendered conversation: `input_ids[t]` has role `roles[t]` and covers `text[slice(*offsets[t])]`."""

    text: str
    input_ids: list[int]
    roles: list[Role]
    offsets: list[Span]

    @property
    def prefix_length(self) -> int:
        """Number of prefix tokens; they are the first ones."""
        return self.roles.count(Role.PREFIX)


class Chat:
    """Renders conversations with one tokenizer's chat template and names the role of every token.

    Raises:
        ChatError: the tokenizer has no template or no offsets, or its template drops what a user says.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template or tokenizer.chat_template
        if not self.template:
            raise ChatError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template: use an instruction-tuned model"
            )
        if not tokenizer.is_fast:
            raise ChatError(
                f"tokenizer {tokenizer.name_or_path!r} gives no character offsets: a fast tokenizer is needed"
            )
        self._special_ids = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        self._content_as_list = False
        self._content_as_list = self._needs_content_list()

    def encode(self, messages: Messages, generation: bool = False) -> Encoded:
        """Token ids and roles of `messages`; with `generation`, the marker that opens the next response is added.

        The ids are those of `tokenizer.apply_chat_template`. A token that stands across a border between template and
        content belongs to the content.

        Raises:
            ChatError: a user or assistant message is blank, no user speaks first, a generation prompt is asked for
                behind an assistant, the template refuses the conversation, or it does not show one of its contents.
        """
        _check(messages, generation)
        text = self.render(messages, generation)
        spans = self._content_spans(messages, generation, text)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], [tuple(pair) for pair in encoding["offset_mapping"]]
        char_roles = self._char_roles(messages, text, spans, ids, offsets)
        roles = [_token_role(char_roles, *offset) for offset in offsets]
        return Encoded(text, ids, roles, offsets)

    def render(self, messages: Messages, generation: bool = False) -> str:
        """The text of `messages` under the template."""
        chat: list[dict[str, Any]] = [dict(message) for message in messages]
        if self._content_as_list:
            chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
        try:
            return self.tokenizer.apply_chat_template(
                chat, chat_template=self.template, tokenize=False, add_generation_prompt=generation
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            order = ", ".join(m["role"] for m in messages)
            raise ChatError(f"the chat template refuses a conversation of roles [{order}]: {error}") from error

    def _needs_content_list(self) -> bool:
        """Templates of vision-language models show a content only when it is a list of parts."""
        probe = secrets.token_hex(8)
        for as_list in (False, True):
            self._content_as_list = as_list
            try:
                if probe in self.render([{"role": "user", "content": probe}]):
                    return as_list
            except ChatError:
                continue
        raise ChatError(f"the chat template of {self.tokenizer.name_or_path!r} does not show what a user says")

    def _content_spans(self, messages: Messages, generation: bool, text: str) -> dict[int, Span]:
        """Character span in `text` of every user and assistant content, by message number."""
        spans: dict[int, Span] = {}
        end = 0
        for number, message in enumerate(messages):
            if message["role"] == "system":
                self._check_system_shown(messages, number, generation, text)
                continue
            place = f"message {number} ({message['role']})"
            span = self._replaced_span(messages, number, generation, text)
            span = span or self._grown_span(messages, number, generation, text)
            if span is None:
                raise ChatError(f"{place}: the chat template does not show its content")
            if span[0] < end:
                raise ChatError(f"{place}: the chat template shows it before an earlier one")
            spans[number] = span
            end = span[1]
        return spans

    def _check_system_shown(self, messages: Messages, number: int, generation: bool, text: str) -> None:
        """A system prompt needs no span (it is prefix or template wherever it stands), but must not be lost."""
        others = messages[:number] + messages[number + 1 :]
        if not messages[number]["content"].strip() or self.render(others, generation) != text:
            return
        if self._replaced_span(messages, number, generation, text) is None:  # else it is the template's own default
            raise ChatError(f"message {number} (system): the chat template does not show its content")

    def _replaced_span(self, messages: Messages, number: int, generation: bool, text: str) -> Span | None:
        """Span of one content, from a rendering in which a sentinel stands in its place."""
        mark = "x" + secrets.token_hex(12)
        parts = self.render(_with_content(messages, number, mark), generation).split(mark)
        if len(parts) != 2:
            return None
        before, after = parts
        fits = text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)
        return (len(before), len(text) - len(after)) if fits else None

    def _grown_span(self, messages: Messages, number: int, generation: bool, text: str) -> Span | None:
        """For templates that look at a content (its `</think>`, its first words): sentinels stand *inside* it, near
        its two ends, and the span grows from them as far as text and content agree."""
        content = messages[number]["content"]
        start = self._inserted_mark(messages, number, generation, text, range(1, len(content)))
        end = self._inserted_mark(messages, number, generation, text, range(len(content) - 1, 0, -1))
        if start is None or end is None:
            return None
        return _grow_left(text, content, *start), _grow_right(text, content, *end)

    def _inserted_mark(
        self, messages: Messages, number: int, generation: bool, text: str, cuts: range
    ) -> tuple[int, int] | None:
        """(cut in the content, place in the text) of the first cut that leaves the rest of the rendering as it is."""
        content = messages[number]["content"]
        for cut in cuts[:64]:
            mark = "x" + secrets.token_hex(12)
            marked = _with_content(messages, number, content[:cut] + mark + content[cut:])
            parts = self.render(marked, generation).split(mark)
            if len(parts) == 2 and "".join(parts) == text:
                return cut, len(parts[0])
        return None

    def _char_roles(
        self, messages: Messages, text: str, spans: dict[int, Span], ids: list[int], offsets: list[Span]
    ) -> list[Role]:
        """One role per character, gaps between contents included."""
        first_user = min(span[0] for span in spans.values())
        roles = [Role.PREFIX if place < first_user else Role.TEMPLATE for place in range(len(text))]
        previous_end = 0
        for number, (start, end) in spans.items():
            if messages[number]["role"] == "user":
                roles[start:end] = [Role.QUERY] * (end - start)
            else:
                roles[previous_end:start] = [Role.POSTFIX] * (start - previous_end)
                next_start = next((spans[later][0] for later in spans if later > number), len(text))
                end = self._turn_end(text, end, next_start, ids, offsets)
                roles[start:end] = [Role.RESPONSE] * (end - start)
            previous_end = end
        if messages[-1]["role"] == "user":
            roles[previous_end:] = [Role.POSTFIX] * (len(text) - previous_end)
        return roles

    def _turn_end(self, text: str, start: int, stop: int, ids: list[int], offsets: list[Span]) -> int:
        """End of what closes a response: up to the end-of-sequence token if special tokens lead there, else the first
        special token, else the first marker or word of the template's text."""
        first_special = None
        for token, (left, right) in zip(ids, offsets):
            if left < start or right > stop:
                continue
            if token in self._special_ids:
                first_special = first_special or right
                if token == self.tokenizer.eos_token_id:
                    return right
            elif text[left:right].strip():
                break
        if first_special:
            return first_special
        plain_marker = re.compile(r"\s*(<[^>]*>|\[[^\]]*\]|\S+)").match(text, start, stop)
        return plain_marker.end() if plain_marker else start


def _check(messages: Messages, generation: bool) -> None:
    for number, message in enumerate(messages):
        if message["role"] not in ("system", "user", "assistant"):
            raise ChatError(f"message {number}: role {message['role']!r} (accepted: system, user, assistant)")
    speakers = [message["role"] for message in messages if message["role"] != "system"]
    if speakers[:1] != ["user"]:
        raise ChatError("a conversation needs a user who speaks first")
    if generation and messages[-1]["role"] != "user":
        raise ChatError("a generation prompt needs a conversation that ends with a user message")
    for number, message in enumerate(messages):
        if message["role"] != "system" and not message["content"].strip():
            raise ChatError(f"message {number} ({message['role']}): it is blank")


def _with_content(messages: Messages, number: int, content: str) -> Messages:
    return [{**m, "content": content} if n == number else m for n, m in enumerate(messages)]


def _grow_left(text: str, content: str, cut: int, place: int) -> int:
    while cut > 0 and place > 0 and content[cut - 1] == text[place - 1]:
        cut, place = cut - 1, place - 1
    return place


def _grow_right(text: str, content: str, cut: int, place: int) -> int:
    while cut < len(content) and place < len(text) and content[cut] == text[place]:
        cut, place = cut + 1, place + 1
    return place


def _token_role(char_roles: list[Role], start: int, end: int) -> Role:
    """Content wins over template text; of two contents the later one wins."""
    inside = char_roles[start:end] or char_roles[start : start + 1] or char_roles[-1:]
    for role in reversed(inside):
        if role in (Role.QUERY, Role.RESPONSE):
            return role
    return inside[0]
