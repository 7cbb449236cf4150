"""Measures a model part by part, into results.json: a loop over the measurements.

The results of one model are plain numbers in one JSON; comparisons of models are made from those
files alone.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ChatError, ModelError
from ..model.generation import GREEDY, generate_greedy
from ..model.layers import gate_of
from ..model.pooled import decisions
from ..model.scoring import Advance, score_answers
from ..text.chat import Chat
from ..text.roles import Message, Messages, Role
from ..util.console import console, progress
from ..util.files import write_whole
from ..util.journal import digest
from ..util.machine import estimated
from ..util.strict_json import read_record
from ..util.words import counted
from .config import MEASUREMENTS, EvaluateConfig
from .measures.base import Measurement
from .measures.pairs import disguises

COUNTED = 24  # texts of a part whose tokens are counted for an estimate
_FORMAT = 4
# The inoculation prompt is part of the questions asked under it; what a cap leaves is among the
# items.
_NOT_MEASURED = {
    "batch_tokens",
    "benign",
    "benign_epochs",
    "inoculation",
    "answers",
    "max_in_domain",
    "max_fluency",
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, as measurements use it.

    Attributes:
        batch_tokens: tokens of one batch, padding and answers included.
        advance: called with the number of answers just scored or written.
    """

    model: Any
    chat: Chat
    batch_tokens: int = 4096
    advance: Advance = lambda _: None

    def score(
        self, prompts: Sequence[Messages], answers: Sequence[Sequence[str | Message]]
    ) -> list[list[Any]]:
        return score_answers(
            self.model, self.chat, prompts, answers, self.batch_tokens, self.advance
        )

    def generate(self, prompts: Sequence[Messages], max_new_tokens: int) -> list[str]:
        return generate_greedy(
            self.model, self.chat, prompts, max_new_tokens, self.batch_tokens, self.advance
        )

    def decide(self, prompts: Sequence[Messages]) -> list[tuple[bool, float]] | None:
        gate = gate_of(self.model)
        if gate is None:
            self.advance(len(prompts))
            return None
        asked = [self.chat.encode(messages, generation=True) for messages in prompts]
        return decisions(self.model, gate.probe, asked, self.batch_tokens, self.advance)

    def check(self, messages: Messages) -> None:
        self.chat.encode(messages)

    def as_generated(self, messages: Messages) -> str:
        """A plain answer is its content; one with calls or reasoning is as the template renders
        it."""
        if not messages[-1].keys() & {"tool_calls", "reasoning_content"}:
            return str(messages[-1]["content"])
        encoded = self.chat.encode(messages)
        start = max(at for at, role in enumerate(encoded.roles) if role == Role.POSTFIX) + 1
        text = self.chat.tokenizer.decode(encoded.input_ids[start:], skip_special_tokens=True)
        return str(text).strip()


@dataclass(frozen=True)
class Part:
    """A part of results.json: what measures it, and its items."""

    name: str
    measurement: Measurement
    items: list[Any]

    def texts(self, config: EvaluateConfig) -> list[tuple[Messages, int]]:
        """Conversations whose last answer is scored, and prompts with the number of tokens that an
        answer may have."""
        return [text for item in self.items for text in self.measurement.texts(item, config)]


def parts_of(config: EvaluateConfig) -> list[Part]:
    """What is measured, in order. A part without items, such as the probes of a benign twin's
    scope, is none: it could not be read again."""
    return [
        Part(name, measurement, items)
        for measurement in MEASUREMENTS.values()
        for name, items in measurement.parts(config).items()
        if items
    ]


def evaluate_model(
    load_model: Callable[[], Any],
    chat: Chat,
    config: EvaluateConfig,
    file: Path,
    title: str,
    model_key: Any = None,
) -> dict[str, Any]:
    """Measures a model part by part, and writes `file` after each part, so that an interrupted
    evaluation can resume. Results of another model, or on other questions, are replaced.

    Args:
        load_model: gives the model; not called when every part is in the file already.
        config: what is measured.
        file: results of one model, JSON.
        title: for the progress bars.
        model_key: what tells the model from others, as plain JSON values: its fingerprint and
            precision.

    Returns:
        The results: `key` (see `evaluation_key`), `model` (`model_key`), digest of `prompts`,
        `decoding`, and `parts` by name, as `measure` of their measurement gives them.
    """
    key = evaluation_key(config)
    about = {"model": model_key, "prompts": prompts_digest(chat, config), "decoding": GREEDY}
    results = _read(file, key, json.loads(json.dumps(about)))
    model = None
    for part in parts_of(config):
        if part.name in results["parts"]:
            continue
        if model is None:
            model = load_model()
            _announce(title, work(config, chat, results["parts"]), model)
        started = time.monotonic()
        with progress(f"{title}: {part.name}", len(part.texts(config))) as advance:
            asked = LoadedModel(model, chat, config.batch_tokens, advance)
            value = part.measurement.measure(part.name, part.items, asked, config)
        results["parts"][part.name] = value
        results["seconds"] = round(results["seconds"] + time.monotonic() - started, 1)
        write_whole(file, json.dumps(results))
    return results


def _announce(title: str, left: "Work", model: Any) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    time_left = estimated(
        parameters, left.scored_tokens, left.written_tokens, device=model.device.type
    )
    console.print(f"{title}: {left}, {time_left}", highlight=False, markup=False, soft_wrap=True)


def evaluation_key(config: EvaluateConfig) -> str:
    """Hash of everything that is measured: two results with the same key can be paired.
    It holds the `repr` of every item: with another class name it is another key."""
    content = [
        _FORMAT,
        config.model_dump(mode="json", exclude=_NOT_MEASURED, exclude_defaults=True),
    ]
    content += [[repr(item) for item in part.items] for part in parts_of(config)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def prompts_digest(chat: Chat, config: EvaluateConfig) -> str:
    """Digest of a prompt under each disguise and of an answer, as the chat template renders them
    here and today."""
    user = {"role": "user", "content": "Hello"}
    rendered = [chat.render([user, {"role": "assistant", "content": "Hi"}])]
    for before in [[], *disguises(config).values()]:
        # A template may refuse a disguise; that is reported where the disguise is used.
        with suppress(ChatError):
            rendered.append(chat.render([*before, user], generation=True))
    return digest(rendered)


def _read(file: Path, key: str, about: dict[str, Any]) -> dict[str, Any]:
    if file.is_file():
        results = read_record(file, "delete it, and `ringfence evaluate` recreates it")
        if results.get("key") == key and {name: results.get(name) for name in about} == about:
            return results
    return {"key": key, **about, "parts": {}, "seconds": 0.0}


# ------------------------------------------------------------------ how much work it is


@dataclass(frozen=True)
class Work:
    """What measuring one model takes: given answers that are scored, answers that the model writes,
    and the tokens of both (for written ones, the most)."""

    scored: int = 0
    scored_tokens: int = 0
    written: int = 0
    written_tokens: int = 0

    def __str__(self) -> str:
        parts = [f"{counted(self.scored, 'answer')} to score"] if self.scored else []
        parts += [f"{counted(self.written, 'answer')} to write"] if self.written else []
        return " and ".join(parts) or "nothing"


def work(config: EvaluateConfig, chat: Chat, done: Collection[str] = ()) -> Work:
    """The work of the parts that are not `done`. Tokens are counted on some texts of each part and
    extrapolated to all."""
    found = Work()
    for part in parts_of(config):
        texts = part.texts(config)
        if part.name in done or not texts:
            continue
        shown = texts[:: math.ceil(len(texts) / COUNTED)]
        mean = sum(_size(messages, chat) for messages, _ in shown) / len(shown)
        scored = sum(messages[-1]["role"] == "assistant" for messages, _ in texts)
        answers = [new_tokens for _, new_tokens in texts if new_tokens]
        found = Work(
            found.scored + scored,
            found.scored_tokens + round(scored * mean),
            found.written + len(answers),
            found.written_tokens + sum(answers),
        )
    return found


def check_lengths(config: EvaluateConfig, chat: Chat, positions: int) -> None:
    """Raises ModelError if a text that is measured, with its answer, has more tokens than a model
    has positions."""
    for part in parts_of(config):
        for messages, new_tokens in part.texts(config):
            size = _size(messages, chat) + new_tokens
            if size > positions:
                raise ModelError(too_long(f"evaluate: {part.name}", size, positions))


def _size(messages: Messages, chat: Chat) -> int:
    return len(chat.encode(messages, generation=messages[-1]["role"] != "assistant").input_ids)


def too_long(what: str, size: int, positions: int) -> str:
    return (
        f"{what}: a text of {size} tokens with its answer, but the model has {positions} "
        "positions; take it out of `evaluate`, or ask for shorter answers"
    )
