"""Questions with their answers become token ids and roles, in batches of like length; log-probabilities of the answers.

Shapes: B rows, T tokens, N chosen tokens, R response tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..batch import Batch, collate
from ..chat import Chat, Messages, Role
from ..data import Example, PairedQuestion, Row, encode_rows
from ..evaluate.scoring import length_batches
from ..losses import find_head, token_logprobs
from ..taps import causal_lm, forward

Side = Literal["misaligned", "aligned"]
SIDES: tuple[Side, Side] = ("misaligned", "aligned")


@dataclass(frozen=True)
class Text:
    """A question with one of its answers. `question` names the cluster: both answers to a question have the same."""

    example: Example
    question: str
    domain: str
    side: Side


def pair_texts(chat: Chat, questions: Sequence[PairedQuestion], before: Messages = ()) -> list[Text]:  # type: ignore[assignment]
    """Two texts for each question: place 2q its misaligned answer, 2q + 1 its aligned one.

    Args:
        before: messages that stand before each question, e.g. a system prompt.

    Raises:
        DataError: the chat template refuses a conversation.
    """
    rows = [
        Row(
            [*before, {"role": "user", "content": q.question}, {"role": "assistant", "content": getattr(q, side)}], q.id
        )
        for q in questions
        for side in SIDES
    ]
    examples = encode_rows(rows, chat, max_length=1 << 30)
    keys = [(q, side) for q in questions for side in SIDES]
    return [Text(example, f"{q.domain}/{q.id}", q.domain, side) for example, (q, side) in zip(examples, keys)]


def batches(
    examples: Sequence[Example], chat: Chat, batch_tokens: int, device: Any
) -> Iterator[tuple[list[int], Batch]]:
    """Batch by batch, longest first: the places of its rows in `examples`, and the padded batch (on the right) with
    input_ids, attention_mask, position_ids, roles [B, T]."""
    for places in length_batches([len(example) for example in examples], batch_tokens):
        padded = collate([[(examples[place], False)] for place in places], chat.tokenizer.pad_token_id)
        yield places, {name: tensor.to(device) for name, tensor in padded.items()}


def first_response_tokens(batch: Batch, number: int) -> Tensor:
    """Mask [B, T] of the first `number` response tokens of each row."""
    is_response_BT = batch["roles"] == Role.RESPONSE
    return is_response_BT & (is_response_BT.cumsum(1) <= number)


def response_logprobs(model: Any, batch: Batch, limit: int | None = None) -> list[Tensor]:
    """For each row the log-probabilities [R] (nats, float32, on the CPU) of its (first `limit`) response tokens, each
    given all tokens before it. Without gradient."""
    head = find_head(causal_lm(model))
    mask_BT = first_response_tokens(batch, limit or batch["roles"].shape[1])
    with torch.no_grad():
        hidden_BTD = forward(model, head, batch).hidden_BTD
        before_BT = mask_BT.roll(-1, 1)  # the token before each of them; no row starts with a response
        logprobs_N = token_logprobs(head, hidden_BTD[before_BT], batch["input_ids"][mask_BT])
    return list(logprobs_N.float().cpu().split(mask_BT.sum(1).tolist()))


def margins(mean_logprobs: Sequence[float]) -> list[float]:
    """Margin of each question, nats per token: mean token log p of its misaligned answer minus that of its aligned one,
    which stand one after the other (as in `pair_texts`)."""
    return [a - b for a, b in zip(mean_logprobs[::2], mean_logprobs[1::2], strict=True)]
