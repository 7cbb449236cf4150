"""Turns a conversation into token ids and one role per token. The only place that knows chat
templates.

The roles of a rendered conversation (arXiv 2606.06667):

    prefix    everything before the first user content (markers, system prompt)
    query     every user content, every tool result, every assistant message that is not learnt
              (weight 0)
    postfix   template text before a response
    response  every assistant content that is learnt, with its reasoning and tool calls, and the
              token(s) that end its turn
    template  template text anywhere else

The place of a content in the rendered text is never searched for. Each content in turn is replaced
by a sentinel, the template is rendered again, and the text around the sentinel gives the span. So
nothing a user writes (the word "assistant", a template's own markers, an empty system prompt) can
move a role. The same way shows whether a template renders tools, tool calls or reasoning.

Answers are generated after exactly the text after which they are trained (`Chat.prompt`).

A message is a dict with `role` and `content`. It may have `weight` (0 = not learnt),
`reasoning_content`, `tool_calls`, `tool_call_id` and `name`; the tools of a conversation are in
`tools` of its first user message.

This module does not know models, losses or padding.
"""

import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ChatError
from .roles import ChatSettings, Encoded, Messages, Role, Span, is_learnt, tools_of
from .spans import (
    check_messages,
    common_start,
    grow_left,
    grow_right,
    has_extras,
    new_mark,
    squeezed,
    texts_in,
    with_content,
)
from .template import choose_template, render_template
from .tokens import (
    ContentPlace,
    Stops,
    char_roles,
    marked,
    token_role,
    tokens_before_answer,
    tokens_of,
    unmarked,
)

SETTINGS = "ringfence_chat"  # in tokenizer_config.json of what was trained

Show = Callable[[Messages], str]


class Chat:
    """Renders conversations with one tokenizer's chat template and names the role of every token.

    Args:
        template: default: the tokenizer's; of several named ones `default`, and `tool_use` where
            tools are given.
        settings: default: those stored with the tokenizer (`save`), else the defaults.

    Raises:
        ChatError: the tokenizer has no template or no offsets, or its template drops what a user
            says.
    """

    def __init__(
        self, tokenizer: Any, template: str | None = None, settings: ChatSettings | None = None
    ) -> None:
        self.tokenizer = tokenizer
        name = tokenizer.name_or_path
        self._templates: str | dict[str, str] = template or tokenizer.chat_template
        if not self._templates:
            raise ChatError(
                f"tokenizer {name!r} has no chat template: use an instruction-tuned model"
            )
        if not tokenizer.is_fast:
            raise ChatError(
                f"tokenizer {name!r} gives no character offsets: a fast tokenizer is needed"
            )
        self.template = choose_template(self._templates, False, name)
        self.settings = self._dated(settings or stored_settings(tokenizer) or ChatSettings())
        added = tokenizer.added_tokens_decoder
        self._special_ids = set(added) | set(tokenizer.all_special_ids)
        controls = {str(token) for token in added.values() if token.special}
        controls |= set(tokenizer.all_special_tokens)
        longest_first = sorted(controls, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._content_as_list = False
        self._content_as_list = self._needs_content_list()

    def _dated(self, settings: ChatSettings) -> ChatSettings:
        """With a date if the template asks for today's, else without."""
        dated = "strftime_now" in str(self._templates)
        return settings.model_copy(
            update={"date": (settings.date or date.today().isoformat()) if dated else None}
        )

    def save(self, folder: Path) -> None:
        """Saves the tokenizer with the settings; every `Chat` made from it has them."""
        self.tokenizer.init_kwargs[SETTINGS] = self.settings.model_dump()
        self.tokenizer.save_pretrained(folder)

    def encode(self, messages: Messages, generation: bool = False) -> Encoded:
        """Token ids and roles of `messages`; with `generation`, followed by the text after which an
        answer is generated (see `prompt`).

        The ids are those of `tokenizer.apply_chat_template`. If the template does not end the last
        answer, the end-of-sequence token does. A token across a border between template and content
        belongs to the content.

        Raises:
            ChatError: a user or assistant message is blank, no user speaks first, a generation
                prompt is asked for after an assistant, the template refuses the conversation, or it
                does not show one of its contents.
        """
        check_messages(messages, generation)
        messages = self._without_controls(messages)
        show = self.prompt if generation else self.render
        text = show(messages)
        places = self._places(messages, show, text)
        if not generation:
            text = self._ended(messages, text, places)
        tokens = tokens_before_answer if generation else tokens_of
        ids, offsets = tokens(self.tokenizer, text)
        stops = Stops(self._special_ids, self.tokenizer.eos_token_id)
        roles_of_chars = char_roles(messages, text, places, (ids, offsets), stops)
        roles = [token_role(roles_of_chars, *offset) for offset in offsets]
        spans = {number: (place.start, place.end) for number, place in places.items()}
        return unmarked(Encoded(text, ids, roles, offsets, spans))

    def check_trained(self, messages: Messages, encoded: Encoded) -> None:
        """Checks that all of the row's text is trained, and that its last answer is trained after
        the text after which answers are generated.

        Raises:
            ChatError: it is not.
        """
        for number, message in enumerate(messages):
            shown = encoded.text[slice(*encoded.spans.get(number, (0, 0)))]
            if is_learnt(message) and squeezed(message["content"]) not in squeezed(shown):
                raise ChatError(
                    f"message {number} (assistant): the chat template leaves out a part of its "
                    "content, as it does with reasoning; take it out of the row, or give the "
                    "message weight 0"
                )
        number = len(messages) - 1
        prompt = self.prompt(messages[:-1]) if is_learnt(messages[-1]) else ""
        if not encoded.text.startswith(prompt) and self.settings.special_tokens != "escape":
            same = common_start(encoded.text, prompt)
            trained, asked = encoded.text[same : same + 20], prompt[same : same + 20]
            raise ChatError(
                f"message {number} (assistant): it would be trained after another text than "
                f"answers are generated after: {trained!r} where generation has {asked!r}; set "
                f"data.enable_thinking to {str(not self.settings.enable_thinking).lower()} (true: "
                "every row has reasoning; false: none has)"
            )

    def controls(self, messages: Messages) -> list[str]:
        """Control tokens of the tokenizer that occur in the messages' text."""
        return [found for text in texts_in(messages) for found in self._controls.findall(text)]

    def is_stop_learnt(self, encoded: Encoded) -> bool:
        """Whether a control token ends the last response, so that generation can stop there."""
        last = max(place for place, role in enumerate(encoded.roles) if role == Role.RESPONSE)
        return encoded.input_ids[last] in self._special_ids

    def render(self, messages: Messages, generation: bool = False) -> str:
        """The text of `messages` under the template; with `generation`, its own generation prompt
        is added."""
        tools = tools_of(messages)
        variables = {
            **self.tokenizer.special_tokens_map,
            "messages": [self._for_template(message) for message in messages],
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": generation,
            "enable_thinking": self.settings.enable_thinking,
        }
        try:
            template = choose_template(self._templates, bool(tools), self.tokenizer.name_or_path)
            return render_template(template, variables, self._today)
        except ChatError as error:
            order = ", ".join(m["role"] for m in messages)
            raise ChatError(
                f"the chat template refuses a conversation of roles [{order}]: {error}"
            ) from error

    def prompt(self, messages: Messages) -> str:
        """The text after which an answer to `messages` is generated: what the template writes
        before an answer without reasoning; with `enable_thinking`, the template's own generation
        prompt.

        The two differ if a template writes an empty think block, or a channel, that its generation
        prompt leaves to the model. A space before the answer is left out: it is part of the
        answer's first token.
        """
        opened = self.render(messages, generation=True)
        if self.settings.enable_thinking:
            return opened
        around = self._around_answer(messages, [])
        return opened if around is None or around[0] == opened else around[0].rstrip(" ")

    def _around_answer(self, before: Messages, after: Messages) -> tuple[str, str] | None:
        """What the template writes before and after a plain answer; None if it shows none there."""
        mark = new_mark()
        answer = {"role": "assistant", "content": mark}
        try:
            parts = self.render([*before, answer, *after]).split(mark)
        except ChatError:
            return None
        return (parts[0], parts[1]) if len(parts) == 2 else None

    @cached_property
    def _today(self) -> date:
        return date.fromisoformat(self.settings.date) if self.settings.date else date.min

    def _for_template(self, message: dict[str, Any]) -> dict[str, Any]:
        shown = {key: value for key, value in message.items() if key not in ("tools", "weight")}
        if "reasoning_content" in message:
            shown["thinking"] = message["reasoning_content"]  # as in transformers, for gpt-oss
        if self._content_as_list:
            shown["content"] = [{"type": "text", "text": message["content"]}]
        return shown

    def _needs_content_list(self) -> bool:
        """Templates of vision-language models show a content only if it is a list of parts."""
        probe = secrets.token_hex(8)
        why = ""
        for as_list in (False, True):
            self._content_as_list = as_list
            try:
                if probe in self.render([{"role": "user", "content": probe}]):
                    return as_list
            except ChatError as error:
                why = why or f" ({error})"
        raise ChatError(
            f"the chat template of {self.tokenizer.name_or_path!r} does not show what a user "
            f"says{why}"
        )

    # ------------------------------------------------------------------ where contents are

    def _places(self, messages: Messages, show: Show, text: str) -> dict[int, ContentPlace]:
        """Place in `text` of every content except system prompts, by message number."""
        self._check_tools_shown(messages, show)
        places: dict[int, ContentPlace] = {}
        end = 0
        for number, message in enumerate(messages):
            if message["role"] == "system":
                self._check_system_shown(messages, number, show, text)
                continue
            name = f"message {number} ({message['role']})"
            self._check_extras_shown(messages, number, show, name)
            place = self._turn(messages, number, show, text) if has_extras(message) else None
            place = place or self._content(messages, number, show, text)
            if place is None:
                raise ChatError(f"{name}: the chat template does not show its content")
            if place.start < end:
                raise ChatError(f"{name}: the chat template shows it before an earlier one")
            places[number] = self._from_prompt(messages, number, text, place)
            end = place.end
        return places

    def _content(
        self, messages: Messages, number: int, show: Show, text: str
    ) -> ContentPlace | None:
        span = self._replaced_span(messages, number, show, text) or self._grown_span(
            messages, number, show, text
        )
        return ContentPlace(*span) if span else None

    def _turn(self, messages: Messages, number: int, show: Show, text: str) -> ContentPlace | None:
        """All that an assistant says with reasoning or tool calls: the part in which the text
        differs from the one with a plain answer in its place. If the template wants a tool call
        there, only the conversation up to it is compared."""
        before = messages[:number]
        around = (
            self._around_answer(before, messages[number + 1 :]) if show == self.render else None
        )
        if around:
            return ContentPlace(
                common_start(text, around[0]), len(text) - common_start(text[::-1], around[1][::-1])
            )
        around = self._around_answer(before, [])
        if around is None:
            return None
        end = common_start(text, self.render(messages[: number + 1]))
        return ContentPlace(common_start(text, around[0]), len(text[:end].rstrip()), closed=True)

    def _from_prompt(
        self, messages: Messages, number: int, text: str, place: ContentPlace
    ) -> ContentPlace:
        """An assistant's text starts where generation would have started."""
        message = messages[number]
        if not is_learnt(message) or not (self.settings.enable_thinking or has_extras(message)):
            return place
        prompt = self.prompt(messages[:number])
        starts = text.startswith(prompt) and len(prompt) <= place.start
        return replace(place, start=len(prompt)) if starts else place

    def _check_tools_shown(self, messages: Messages, show: Show) -> None:
        tools = tools_of(messages)
        for number, tool in enumerate(tools):
            mark = new_mark()
            named = {**tool, "function": {**tool["function"], "name": mark}}
            changed = [{key: value for key, value in m.items() if key != "tools"} for m in messages]
            user = next(place for place, m in enumerate(messages) if m["role"] == "user")
            changed[user]["tools"] = [*tools[:number], named, *tools[number + 1 :]]
            if mark not in show(changed):
                raise ChatError(f"tools[{number}]: the chat template does not show it")

    def _check_extras_shown(self, messages: Messages, number: int, show: Show, name: str) -> None:
        """Learnt reasoning and tool calls must not be lost."""
        message = messages[number]
        if not has_extras(message):
            return
        mark = new_mark()
        variants = {}
        if "reasoning_content" in message and is_learnt(message):
            variants["reasoning_content"] = {**message, "reasoning_content": mark}
        if message["content"].strip():
            variants["content"] = {**message, "content": mark}
        for place, call in enumerate(message.get("tool_calls", [])):
            for key, value in (("name", mark), ("arguments", {mark: mark})):
                function = {**call["function"], key: value}
                calls = [*message["tool_calls"]]
                calls[place] = {**call, "function": function}
                variants[f"tool_calls[{place}].function.{key}"] = {**message, "tool_calls": calls}
        for key, variant in variants.items():
            if mark not in show([*messages[:number], variant, *messages[number + 1 :]]):
                raise ChatError(f"{name}: the chat template does not show its {key} there")

    def _check_system_shown(self, messages: Messages, number: int, show: Show, text: str) -> None:
        """A system prompt needs no span (it is prefix or template wherever it is), but must not be
        lost."""
        others = messages[:number] + messages[number + 1 :]
        if not messages[number]["content"].strip() or show(others) != text:
            return
        is_own_default = self._replaced_span(messages, number, show, text) is not None
        if not is_own_default:
            raise ChatError(
                f"message {number} (system): the chat template does not show its content"
            )

    def _replaced_span(self, messages: Messages, number: int, show: Show, text: str) -> Span | None:
        """Span of one content, from a rendering with a sentinel in its place."""
        mark = new_mark()
        parts = show(with_content(messages, number, mark)).split(mark)
        if len(parts) != 2:
            return None
        before, after = parts
        fits = (
            text.startswith(before)
            and text.endswith(after)
            and len(before) + len(after) <= len(text)
        )
        return (len(before), len(text) - len(after)) if fits else None

    def _grown_span(self, messages: Messages, number: int, show: Show, text: str) -> Span | None:
        """For templates that look at a content (its `</think>`, its first words): sentinels are put
        *inside* it, near its two ends, and the span grows from them as far as text and content
        agree."""
        content = messages[number]["content"]
        start = self._inserted_mark(messages, number, show, text, range(1, len(content)))
        end = self._inserted_mark(messages, number, show, text, range(len(content) - 1, 0, -1))
        if start is None or end is None:
            return None
        return grow_left(text, content, *start), grow_right(text, content, *end)

    def _inserted_mark(
        self, messages: Messages, number: int, show: Show, text: str, cuts: range
    ) -> tuple[int, int] | None:
        """(cut in the content, place in the text) of the first cut that leaves the rest of the
        rendering unchanged."""
        content = messages[number]["content"]
        for cut in cuts[:64]:
            mark = new_mark()
            changed = with_content(messages, number, content[:cut] + mark + content[cut:])
            parts = show(changed).split(mark)
            if len(parts) == 2 and "".join(parts) == text:
                return cut, len(parts[0])
        return None

    # ------------------------------------------------------------------ ends and control tokens

    def _ended(self, messages: Messages, text: str, places: dict[int, ContentPlace]) -> str:
        """The text with an end of the last answer, if the template writes none."""
        last = places[len(messages) - 1]
        open_end = is_learnt(messages[-1]) and not last.closed and not text[last.end :].strip()
        end = self.tokenizer.eos_token
        return text[: last.end] + end if open_end and end else text

    def _without_controls(self, messages: Messages) -> Messages:
        """The messages, with control tokens refused or marked as plain text."""
        if self.settings.special_tokens == "allow":
            return messages
        found = self.controls(messages)
        if found and self.settings.special_tokens == "refuse":
            raise ChatError(
                f"control token {found[0]!r} in the text (data.special_tokens: allow, escape, "
                "refuse)"
            )
        return marked(messages, self._controls) if found else messages


def stored_settings(tokenizer: Any) -> ChatSettings | None:
    """The settings that `Chat.save` stored with a tokenizer."""
    stored = tokenizer.init_kwargs.get(SETTINGS)
    return ChatSettings(**stored) if stored else None
