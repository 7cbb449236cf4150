"""Safe rows on-policy: the reference rewrites the answers of a pool (arXiv 2605.31328).

Such rows do not move the model when interleaved: they are what it says anyway. In a conversation of
several turns every answer is rewritten, each after the new ones before it. Does not know training
or defenses.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..errors import DataError
from ..model.files import load_tokenizer
from ..model.fingerprint import fingerprint
from ..model.generation import generate
from ..model.loading import load_model
from ..model.precision import Precision, settled
from ..text.chat import Chat
from ..text.encode import encode_rows
from ..text.roles import Messages, Row
from ..text.rows import load_rows
from ..util.console import progress
from ..util.files import write_whole
from ..util.journal import append, digest, open_journal

TABLE = "regenerated answers"

# By digest of the messages, and number of the assistant's turn.
Answers = dict[tuple[str, int], dict[str, Any]]


@dataclass(frozen=True)
class Regenerated:
    """Numbers of rows written, and left out because an answer was `unfinished` or `blank`."""

    file: Path
    rows: int
    unfinished: int
    blank: int


def regenerate(
    pool: str,
    output: str | Path,
    *,
    model: str = "default",
    precision: Precision = "auto",
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 256,
    batch_tokens: int = 4096,
) -> Regenerated:
    """Writes the rows of a pool, in order, with the model's own answers; can be resumed.

    Answers go to `OUTPUT.journal` as they come; `output` is written from it when all are done.

    Args:
        temperature: 0 = greedy; else every answer is drawn with its own seed, made from `seed`, row
            and turn.
        max_new_tokens: a row is left out if an answer does not end its turn within this limit.

    Raises:
        DataError: a row cannot be read, `output` is not ours, its journal has other settings, or no
            row is left.
        ModelError: the model cannot be loaded.
    """
    file, journal, precision = Path(output), Path(f"{output}.journal"), settled(precision)
    if file.exists() and not journal.exists():
        raise DataError(f"{file}: exists already; name another output")
    rows = load_rows(pool)
    for row in rows:
        if any("tool_calls" in message for message in row.messages):
            raise DataError(
                f"{row.origin}: tool calls cannot be rewritten, because their results would no "
                "longer fit them"
            )
    chat = Chat(load_tokenizer(model))
    encode_rows(rows, chat, max_length=2**31)  # raises for a row that the template refuses
    conversations = {digest(row.messages): row.messages for row in rows}
    key = {
        "pool": digest(sorted(conversations)),
        "model": fingerprint(model),
        "precision": precision,
        "temperature": temperature,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
    }
    lines = open_journal(journal, TABLE, key, {"model": model, "pool": pool}, _AnsweredTurn)
    answers: Answers = {(line["digest"], line["turn"]): line for line in lines}
    loaded = cache(lambda: load_model(model, precision))
    sampling = {
        "max_new_tokens": max_new_tokens,
        "batch_tokens": batch_tokens,
        "temperature": temperature,
    }
    for turn in range(max(map(_turns, conversations.values()))):
        _ask(loaded, chat, conversations, answers, turn, seed, journal, sampling)
    return _write(file, rows, answers, max_new_tokens)


class _AnsweredTurn(BaseModel):
    """A line of the journal."""

    model_config = ConfigDict(strict=True)
    digest: str
    turn: int
    finished: bool
    text: str


def _turns(messages: Messages) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def _ask(
    load: Callable[[], Any],
    chat: Chat,
    conversations: dict[str, Messages],
    answers: Answers,
    turn: int,
    seed: int,
    journal: Path,
    sampling: dict[str, Any],
) -> None:
    """Answers the assistant's turn number `turn` in every conversation that has one."""
    prompts = {key: _until(turn, messages, key, answers) for key, messages in conversations.items()}
    has_turn = {key for key, messages in conversations.items() if _turns(messages) > turn}
    asked = {key: prompt for key, prompt in prompts.items() if prompt and key in has_turn}
    keys = list(asked)
    known = {place for place, key in enumerate(keys) if (key, turn) in answers}
    if len(known) == len(keys):
        return
    seeds = [int(digest([seed, key, turn])[:15], 16) for key in keys]
    with progress(f"{journal.stem}: answers, turn {turn + 1}", len(keys), len(known)) as advance:
        chats = list(asked.values())
        for batch in generate(load(), chat, chats, seeds=seeds, skip=known, **sampling):
            lines = [
                dict(digest=keys[at], turn=turn, finished=answer.finished, text=answer.text)
                for at, answer in batch.items()
            ]
            append(journal, lines)
            answers.update({(line["digest"], turn): line for line in lines})  # type: ignore[misc]
            advance(len(lines))


def _until(turn: int, messages: Messages, key: str, answers: Answers) -> Messages | None:
    """The conversation before the assistant's turn `turn`; None if a new answer is unusable."""
    written: Messages = []
    number = 0
    for message in messages:
        if message["role"] != "assistant":
            written.append(message)
            continue
        if number == turn:
            break
        answer = answers[(key, number)]
        if not (answer["finished"] and answer["text"]):
            return None
        written.append({"role": "assistant", "content": answer["text"]})
        number += 1
    return written


def _write(file: Path, rows: list[Row], answers: Answers, max_new_tokens: int) -> Regenerated:
    written, unfinished, blank = [], 0, 0
    for row in rows:
        key = digest(row.messages)
        messages = _until(_turns(row.messages), row.messages, key, answers)
        if messages:
            written.append({"messages": messages, "origin": row.origin})
        elif all(
            answers.get((key, turn), {"finished": True})["finished"]
            for turn in range(_turns(row.messages))
        ):
            blank += 1
        else:
            unfinished += 1
    if not written:
        raise DataError(
            f"{file}: no row is left: {unfinished} have no end of turn within {max_new_tokens} "
            f"tokens (raise --max-new-tokens), {blank} are blank"
        )
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    return Regenerated(file, len(written), unfinished, blank)
