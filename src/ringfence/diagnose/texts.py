"""Questions with answers as token ids and roles, and log-probabilities of the answers.

Shapes: B rows, T tokens, N chosen tokens, R response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..model.activations import first_response_tokens
from ..model.layers import causal_lm
from ..model.losses import find_head, token_logprobs
from ..model.taps import forward
from ..text.batch import Batch, Example
from ..text.chat import Chat
from ..text.encode import encode_rows
from ..text.roles import Message, Row
from ..text.rows import PairedQuestion

Side = Literal["misaligned", "aligned"]
SIDES: tuple[Side, Side] = ("misaligned", "aligned")


@dataclass(frozen=True)
class Text:
    """A question with one of its answers. `question` is the cluster that both answers share."""

    example: Example
    question: str
    domain: str
    side: Side


def pair_texts(
    chat: Chat, questions: Sequence[PairedQuestion], before: Sequence[Message] = ()
) -> list[Text]:
    """Two texts for each question: place 2q its misaligned answer, 2q + 1 its aligned one.

    Args:
        before: messages before each question, e.g. a system prompt.

    Raises:
        DataError: the chat template refuses a conversation.
    """
    examples = encode_rows(pair_rows(questions, before), chat, max_length=1 << 30)
    keys = [(q, side) for q in questions for side in SIDES]
    return [
        Text(example, example.origin, q.domain, side) for example, (q, side) in zip(examples, keys)
    ]


def pair_rows(questions: Sequence[PairedQuestion], before: Sequence[Message] = ()) -> list[Row]:
    """Two rows for each question: misaligned answer, then aligned one; origin: the question."""
    return [
        Row(
            [
                *before,
                {"role": "user", "content": q.question},
                {"role": "assistant", "content": getattr(q, side)},
            ],
            f"{q.domain}/{q.id}",
        )
        for q in questions
        for side in SIDES
    ]


def response_logprobs(model: Any, batch: Batch, limit: int | None = None) -> list[Tensor]:
    """For each row the log-probabilities [R] (nats, float32, on the CPU) of its (first `limit`)
    response tokens, each given all tokens before it. Without gradient."""
    head = find_head(causal_lm(model))
    mask_BT = first_response_tokens(batch, limit or batch["roles"].shape[1])
    with torch.no_grad():
        hidden_BTD = forward(model, head, batch).hidden_BTD
        # The token before each of them; no row starts with a response.
        before_BT = mask_BT.roll(-1, 1)
        logprobs_N = token_logprobs(head, hidden_BTD[before_BT], batch["input_ids"][mask_BT])
    return list(logprobs_N.float().cpu().split(mask_BT.sum(1).tolist()))


def margins(mean_logprobs: Sequence[float]) -> list[float]:
    """Margin of each question, nats per token: mean token log p of its misaligned answer minus that
    of its aligned one, which follows it (as in `pair_texts`)."""
    return [a - b for a, b in zip(mean_logprobs[::2], mean_logprobs[1::2], strict=True)]
