"""A user's own held-out rows: loss on their responses, and exact match of greedy answers.

Does not know training; rows are of any form and source that `data` reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ChatError, DataError
from ...model.scoring import Advance, generate_greedy, score_answers
from ...stats import Interval, rate_interval, ratio_interval
from ...text.chat import Chat
from ...text.roles import Messages, Role, Row, is_learnt


@dataclass(frozen=True)
class HeldOut:
    """`loss` in nats per response token, `exact` the share of responses met word for word (None where not asked)."""

    loss: Interval
    exact: Interval | None


def measure(
    model: Any,
    chat: Chat,
    rows: Sequence[Row],
    batch_tokens: int,
    max_new_tokens: int = 64,
    advance: Advance = lambda _: None,
) -> list[dict[str, Any]]:
    """Scores every response of every row, given the true turns before it, and answers the same prompts greedily.

    Args:
        batch_tokens: tokens of one batch, padding included.
        max_new_tokens: of an answer; 0 = only the loss.
        advance: called with the number of responses just scored, and again when they are answered.

    Returns:
        For each response: origin of its row, logprob (sum over its tokens, end of turn included, nats), tokens; where
        asked, expected, answer and exact (equal but for white space).

    Raises:
        DataError: the chat template refuses a row.
    """
    _check(chat, rows)
    turns = [
        (row, at) for row in rows for at, message in enumerate(row.messages) if is_learnt(message)
    ]
    prompts = [row.messages[:at] for row, at in turns]
    given = [row.messages[at] for row, at in turns]
    scores = [
        found[0]
        for found in score_answers(
            model, chat, prompts, [[m] for m in given], batch_tokens, advance
        )
    ]
    expected = [_as_generated(chat, row.messages[: at + 1]) for row, at in turns]
    items = [
        {"origin": row.origin, "logprob": score.logprob, "tokens": score.tokens}
        for (row, _), score in zip(turns, scores)
    ]
    if not max_new_tokens:
        return items
    answers = generate_greedy(model, chat, prompts, max_new_tokens, batch_tokens, advance)
    return [
        {**item, "expected": e, "answer": a, "exact": a.split() == e.split()}
        for item, e, a in zip(items, expected, answers)
    ]


def summary(items: Sequence[dict[str, Any]]) -> HeldOut:
    """Loss and exact match with 95 % intervals over rows: the responses of one row are drawn together."""
    losses: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for item in items:
        losses[item["origin"]] = losses.get(item["origin"], 0.0) - item["logprob"]
        tokens[item["origin"]] = tokens.get(item["origin"], 0) + item["tokens"]
    exact = None
    if "exact" in items[0]:
        exact = rate_interval(
            [float(item["exact"]) for item in items], [item["origin"] for item in items]
        )
    return HeldOut(ratio_interval(list(losses.values()), list(tokens.values())), exact)


def _as_generated(chat: Chat, messages: Messages) -> str:
    """The last response as the text of an answer would be; a plain one is its content."""
    if not messages[-1].keys() & {"tool_calls", "reasoning_content"}:
        return str(messages[-1]["content"])
    encoded = chat.encode(messages)
    start = max(place for place, role in enumerate(encoded.roles) if role == Role.POSTFIX) + 1
    return str(chat.tokenizer.decode(encoded.input_ids[start:], skip_special_tokens=True)).strip()


def _check(chat: Chat, rows: Sequence[Row]) -> None:
    for row in rows:
        try:
            chat.encode(row.messages)
        except ChatError as error:
            raise DataError(f"{row.origin}: {error}") from error
