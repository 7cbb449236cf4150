"""Log-probabilities of given answers under any model, batched by length. Does not generate (see
`generation`)."""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ..errors import ChatError, DataError, ModelError
from ..text.chat import Chat
from ..text.roles import Message, Messages, Role, Row
from .files import position_limit
from .layers import causal_lm, gate_of, is_cache_plain
from .losses import Head, find_head, token_logprobs
from .taps import CommonPrefix, Needs, compute_prefix, forward

Advance = Callable[[int], None]
CPU_TOKENS = 1024  # in one forward on a CPU: with more, activations no longer fit its caches


@dataclass(frozen=True)
class AnswerScore:
    """Sum of the log-probabilities (nats) of an answer's tokens, including its end of turn, and
    their number."""

    logprob: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.logprob / self.tokens


def score_answers(
    model: Any,
    chat: Chat,
    prompts: Sequence[Messages],
    answers: Sequence[Sequence[str | Message]],
    batch_tokens: int,
    advance: Advance = lambda _: None,
) -> list[list[AnswerScore]]:
    """Scores the given answers to each prompt.

    The answers to one prompt follow it in one row, each seeing only the prompt and itself, so the
    prompt is computed once. Models that cannot do that (checked on the first prompt) get a row per
    answer.

    Args:
        prompts: conversations that end with a user message.
        answers: for each prompt, its answers: texts, or assistant messages.
        batch_tokens: tokens in one batch, padding included.
        advance: called with the number of answers just scored.
    """
    head = find_head(causal_lm(model))
    rows = [_rows(chat, messages, texts) for messages, texts in zip(prompts, answers, strict=True)]
    lengths = [len(row.prompt) + max(map(len, row.answers)) for group in rows for row in group]
    check_positions(model, lengths)
    if not _can_pack(model, head, rows):
        rows = [
            [PromptRow(row.prompt, [one], row.prefix) for row in group for one in row.answers]
            for group in rows
        ]
    flat = [row for group in rows for row in group]
    scored: list[list[AnswerScore]] = [[] for _ in flat]
    for places in forward_batches([len(row) for row in flat], batch_tokens, model.device):
        found = _score_rows(model, head, [flat[place] for place in places])
        for place, scores in zip(places, found):
            scored[place] = scores
        advance(sum(len(scored[place]) for place in places))
    by_row = iter(scored)
    return [[score for _ in group for score in next(by_row)] for group in rows]


def score_under(
    model: Any,
    chat: Chat,
    rows: Sequence[Row],
    settings: Sequence[Callable[[], AbstractContextManager[Any]]],
    batch_tokens: int,
    skip: Container[int] = (),
) -> Iterator[dict[int, list[AnswerScore]]]:
    """Scores the last answer of each row under several settings of one model, e.g. each of its
    adapters.

    A batch goes through all settings before the next one starts.

    Args:
        settings: each makes a context in which the model is to be scored.
        skip: places of rows that need no score. The other rows stay in the batches they have
            without `skip`, so a resumed pass computes what a whole one does.

    Yields:
        For each batch, by the row's place: its score under every setting.

    Raises:
        DataError: the chat template refuses a row.
    """
    head = find_head(causal_lm(model))
    encoded = [_last_answer(chat, row) for row in rows]
    check_positions(model, [len(row) for row in encoded])
    for places in forward_batches([len(row) for row in encoded], batch_tokens, model.device, skip):
        batch = [encoded[place] for place in places]
        scores = []
        for setting in settings:
            with setting():
                scores.append([found[0] for found in _score_rows(model, head, batch)])
        yield dict(zip(places, map(list, zip(*scores))))


def _last_answer(chat: Chat, row: Row) -> "PromptRow":
    try:
        return _rows(chat, row.messages[:-1], [row.messages[-1]])[0]
    except ChatError as error:
        raise DataError(f"{row.origin}: {error}") from error


@dataclass(frozen=True)
class PromptRow:
    """A prompt's token ids, and those of answers to it.

    `prefix`: the number of the prompt's tokens before the first user content; 0 = unknown.
    """

    prompt: list[int]
    answers: list[list[int]]
    prefix: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


def _rows(chat: Chat, messages: Messages, answers: Sequence[str | Message]) -> list[PromptRow]:
    """One row for all answers whose prompt has the same tokens (a template may look at the
    answer)."""
    by_prompt: list[PromptRow] = []
    for answer in answers:
        message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        # It is scored, learnt or not.
        message = {key: value for key, value in message.items() if key != "weight"}
        encoded = chat.encode([*messages, message])
        end = len(encoded.roles) - encoded.roles[::-1].index(Role.RESPONSE)
        start = next(
            place for place in range(end, 0, -1) if encoded.roles[place - 1] != Role.RESPONSE
        )
        prompt, response = encoded.input_ids[:start], encoded.input_ids[start:end]
        if by_prompt and by_prompt[-1].prompt == prompt:
            by_prompt[-1].answers.append(response)
        else:
            by_prompt.append(PromptRow(prompt, [response], encoded.prefix_length))
    return by_prompt


def _can_pack(model: Any, head: Head, rows: list[list[PromptRow]]) -> bool:
    """Whether answers may share a row: attention takes a free mask and gives the same scores on the
    first row."""
    flat = [row for group in rows for row in group]
    shared = [row for row in flat if len(row.answers) > 1]
    if not shared or not takes_free_mask(model, max(map(len, flat))):
        return False
    packed = _score_rows(model, head, shared[:1])[0]
    alone = _score_rows(
        model, head, [PromptRow(shared[0].prompt, [answer]) for answer in shared[0].answers]
    )
    return all(abs(a.mean - b[0].mean) < 0.05 for a, b in zip(packed, alone))


def takes_free_mask(model: Any, width: int) -> bool:
    """Whether attention takes a mask of any shape, and sees all of a row of `width` tokens."""
    config = causal_lm(model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return config._attn_implementation in ("sdpa", "eager") and not (window and width > window)


def _score_rows(model: Any, head: Head, rows: list[PromptRow]) -> list[list[AnswerScore]]:
    """Scores of each row's answers, from one forward over all rows."""
    hidden_BTD = hidden_states(model, head, rows)
    sources, targets, lengths = [], [], []
    for number, row in enumerate(rows):
        start = len(row.prompt)
        for answer in row.answers:
            before = [len(row.prompt) - 1, *range(start, start + len(answer) - 1)]
            sources += [(number, place) for place in before]
            targets += answer
            lengths.append(len(answer))
            start += len(answer)
    row_index, place_index = torch.tensor(sources, device=model.device).T
    logprobs = token_logprobs(
        head, hidden_BTD[row_index, place_index], torch.tensor(targets, device=model.device)
    )
    scores = iter(AnswerScore(float(part.sum()), len(part)) for part in logprobs.split(lengths))
    return [[next(scores) for _ in row.answers] for row in rows]


def hidden_states(model: Any, head: Head, rows: list[PromptRow]) -> Tensor:
    """Final hidden states [B, T, D] of one forward over all rows, without gradient. The answers of
    a row follow its prompt one after another, each seeing only the prompt and itself."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        start = len(row.prompt)
        places = [range(start), *(range(start, start + len(answer)) for answer in row.answers)]
        tokens = [token for part in (row.prompt, *row.answers) for token in part]
        ids[number, : len(row)] = torch.tensor(tokens)
        positions[number, : len(row)] = torch.tensor([place for part in places for place in part])
    if all(len(row.answers) <= 1 for row in rows):
        mask = (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()
    else:
        mask = _free_mask(rows, width, head.module.weight.dtype)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        prefix = common_prefix(model, rows)
        if prefix is not None and mask.ndim == 4:
            mask = mask[:, :, prefix.hidden_1PD.shape[1] :]
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        taps = forward(model, head, batch, Needs(), prefix)
    return taps.hidden_BTD


def common_prefix(
    model: Any, rows: list[PromptRow], known: dict[tuple[int, ...], CommonPrefix] | None = None
) -> CommonPrefix | None:
    """The tokens that all prompts begin with, computed once. None for a single row, for prompts
    that differ before their first user content (a frozen prefix must not be cut in two), for models
    with recurrent states, and for scoped models, where rows decide how it is computed."""
    if not is_cache_plain(causal_lm(model)) or _decides(model):
        return None
    prompts = [row.prompt[:-1] for row in rows]  # the last token predicts
    # What the first and the last in sorted order share, all share.
    common = [
        a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(min(prompts), max(prompts)))
    ]
    if len(rows) < 2 or not all(0 < row.prefix <= len(common) for row in rows):
        return None
    if known is None:
        return compute_prefix(model, torch.tensor(common, device=model.device))
    # Up to the first user content alone, which batches have in common.
    ids = tuple(common[: min(row.prefix for row in rows)])
    if ids not in known:
        known[ids] = compute_prefix(model, torch.tensor(ids, device=model.device))
    return known[ids]


def _decides(model: Any) -> bool:
    gate = gate_of(model)
    return gate is not None and gate.is_on


def _free_mask(rows: list[PromptRow], width: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T], 0 where a token sees another one: the prompt before it, and what precedes it in
    its answer."""
    # Padding sees itself, so no softmax is empty.
    sees = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    for number, row in enumerate(rows):
        start = len(row.prompt)
        sees[number, : len(row), :start] = torch.ones(len(row), start, dtype=torch.bool).tril()
        for answer in row.answers:
            end = start + len(answer)
            own = torch.ones(len(answer), len(answer), dtype=torch.bool)
            sees[number, start:end, start:end] = own.tril()
            start = end
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def check_positions(model: Any, lengths: Sequence[int]) -> None:
    """Raises ModelError if a row is longer than the model's table of positions."""
    most = position_limit(causal_lm(model).config.get_text_config())
    if most is not None and max(lengths, default=0) > most:
        raise ModelError(
            f"a row of {max(lengths)} tokens (its answer included), but the model has {most} "
            "positions; take shorter texts or answers, or another model"
        )


def forward_batches(
    lengths: list[int], batch_tokens: int, device: torch.device, skip: Container[int] = ()
) -> Iterator[list[int]]:
    """`length_batches` for one forward each: on a CPU at most `CPU_TOKENS`, which is faster than
    more at once."""
    at_once = min(batch_tokens, CPU_TOKENS) if device.type == "cpu" else batch_tokens
    return length_batches(lengths, at_once, skip)


def length_batches(
    lengths: list[int],
    batch_tokens: int,
    skip: Container[int] = (),
    contents: Sequence[list[int]] = (),
) -> Iterator[list[int]]:
    """Batches of the items' places, longest first (equal contents together), as large as the padded
    batch stays within `batch_tokens`; then those in `skip` are taken out."""
    batches: list[list[int]] = []
    for place in sorted(
        range(len(lengths)), key=lambda p: (-lengths[p], contents[p] if contents else [])
    ):
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(place)
    for batch in batches:
        left = [place for place in batch if place not in skip]
        if left:
            yield left
