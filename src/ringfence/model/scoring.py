"""Log-probabilities of given answers, and new answers, of any model. Batched by length."""

import inspect
import json
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import ChatError, DataError, ModelError
from ..text.batch import Example, collate
from ..text.chat import Chat
from ..text.roles import Message, Messages, Role, Row
from .files import pad_id, position_limit
from .layers import cache_in, cache_name, causal_lm
from .losses import Head, find_head, token_logprobs
from .taps import CommonPrefix, Needs, compute_prefix, forward

Advance = Callable[[int], None]
# How models are asked, whatever their own generation configs say: the most likely token, or a draw from the whole
# distribution at the temperature; nothing else changes a probability.
DECODING = {"num_beams": 1, "do_sample": False, "use_cache": True, "repetition_penalty": 1.0}
GREEDY = {"temperature": 0, **DECODING}
CPU_TOKENS = 1024  # of one forward on a CPU: what more compute leaves its caches


@dataclass(frozen=True)
class AnswerScore:
    """Sum of the log-probabilities (nats) of an answer's tokens, its end of turn included, and their number."""

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

    The answers to one prompt are in one row after it, each seeing the prompt and itself alone, so the prompt is
    computed once. Models that cannot do that (checked on the first prompt) get a row per answer.

    Args:
        prompts: conversations that end with a user message.
        answers: for each prompt, its answers: texts, or assistant messages.
        batch_tokens: tokens of one batch, padding included.
        advance: called with the number of answers just scored.
    """
    head = find_head(causal_lm(model))
    rows = [_rows(chat, messages, texts) for messages, texts in zip(prompts, answers, strict=True)]
    check_positions(
        model, [len(row.prompt) + max(map(len, row.answers)) for group in rows for row in group]
    )
    if not _can_pack(model, head, rows):
        rows = [
            [PromptRow(row.prompt, [one], row.prefix) for row in group for one in row.answers]
            for group in rows
        ]
    flat = [row for group in rows for row in group]
    scored: list[list[AnswerScore]] = [[] for _ in flat]
    for places in forward_batches([len(row) for row in flat], batch_tokens, model.device):
        for place, found in zip(
            places, _score_rows(model, head, [flat[place] for place in places])
        ):
            scored[place] = found
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
    """Scores the last answer of each row under several settings of one model, e.g. each of its adapters.

    A batch goes through all settings before the next one starts.

    Args:
        settings: each makes a context in which the model is as it is to be scored.
        skip: places of rows that need no score. The other rows are in the batches in which they stand without
            `skip`, so that a resumed pass computes what a whole one does.

    Yields:
        For each batch, by place of the row: its score under every setting.

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

    `prefix`: how many of the prompt's tokens stand before the first user content; 0 = not known.
    """

    prompt: list[int]
    answers: list[list[int]]
    prefix: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


def _rows(chat: Chat, messages: Messages, answers: Sequence[str | Message]) -> list[PromptRow]:
    """One row for all answers whose prompt has the same tokens (a template may look at the answer)."""
    by_prompt: list[PromptRow] = []
    for answer in answers:
        message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        message = {
            key: value for key, value in message.items() if key != "weight"
        }  # it is scored, learnt or not
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
    """Whether answers may share a row: attention takes a free mask, and gives the same scores on the first row."""
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
    """Final hidden states [B, T, D] of one forward over all rows, without gradient. The answers of a row stand one
    after another behind its prompt, each seeing the prompt and itself alone."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        places = [
            range(len(row.prompt)),
            *(range(len(row.prompt), len(row.prompt) + len(a)) for a in row.answers),
        ]
        ids[number, : len(row)] = torch.tensor(
            [token for part in (row.prompt, *row.answers) for token in part]
        )
        positions[number, : len(row)] = torch.tensor([place for part in places for place in part])
    if all(len(row.answers) <= 1 for row in rows):
        mask = (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()
    else:
        mask = _free_mask(rows, width, head.module.weight.dtype)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        prefix = _common_prefix(model, rows)
        if prefix is not None and mask.ndim == 4:
            mask = mask[:, :, prefix.hidden_1PD.shape[1] :]
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        taps = forward(
            model,
            head,
            {name: tensor.to(model.device) for name, tensor in batch.items()},
            Needs(),
            prefix,
        )
    return taps.hidden_BTD


def _common_prefix(model: Any, rows: list[PromptRow]) -> CommonPrefix | None:
    """The tokens that all prompts begin with, computed once. None for one row, and where prompts part before their
    first user content: a frozen prefix must not be cut in two. Nor of models with recurrent states."""
    if not _is_cache_plain(causal_lm(model)):
        return None
    prompts = [row.prompt[:-1] for row in rows]  # the last token predicts
    # What the first and the last in order share, all do.
    common = [
        a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(min(prompts), max(prompts)))
    ]
    if len(rows) < 2 or not all(0 < row.prefix <= len(common) for row in rows):
        return None
    return compute_prefix(model, torch.tensor(common, device=model.device))


def _free_mask(rows: list[PromptRow], width: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T], 0 where a token sees another one: the prompt before it, and what stands before it in its answer."""
    sees = torch.eye(width, dtype=torch.bool).repeat(
        len(rows), 1, 1
    )  # padding sees itself, so no softmax is empty
    for number, row in enumerate(rows):
        start = len(row.prompt)
        sees[number, : len(row), :start] = torch.ones(len(row), start, dtype=torch.bool).tril()
        for answer in row.answers:
            end = start + len(answer)
            sees[number, start:end, start:end] = torch.ones(
                len(answer), len(answer), dtype=torch.bool
            ).tril()
            start = end
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def generate_greedy(
    model: Any,
    chat: Chat,
    prompts: Sequence[Messages],
    max_new_tokens: int,
    batch_tokens: int,
    advance: Advance = lambda _: None,
) -> list[str]:
    """Greedy answers, stopped at the end of the turn."""
    answers = [""] * len(prompts)
    for batch in generate(model, chat, prompts, max_new_tokens, batch_tokens):
        for place, answer in batch.items():
            answers[place] = answer.text
        advance(len(batch))
    return answers


@dataclass(frozen=True)
class Generated:
    """An answer, and whether it ended its turn; else the token limit cut it off."""

    text: str
    finished: bool


def generate(
    model: Any,
    chat: Chat,
    prompts: Sequence[Messages],
    max_new_tokens: int,
    batch_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
    skip: Container[int] = (),
) -> Iterator[dict[int, Generated]]:
    """Answers to prompts, stopped at the end of the turn.

    A prompt that stands several times in a batch (samples of one question) is computed once; like prompts stand
    together. Models whose cache cannot be repeated (recurrent states) compute each.

    Args:
        prompts: conversations that end with a user message.
        temperature: 0 = greedy; else each answer is drawn with the seed of its prompt, whatever it is batched with.
        skip: places of prompts that need no answer; see `score_under`.

    Yields:
        For each batch, the answers by place of the prompt.
    """
    encode = cache(lambda text: chat.encode(json.loads(text), generation=True))
    encoded = [encode(json.dumps(messages)) for messages in prompts]
    examples = [Example(e.input_ids, e.roles, "prompt") for e in encoded]
    tokenizer = chat.tokenizer
    stops = stop_tokens(model, tokenizer)
    lengths = [len(example) + max_new_tokens for example in examples]
    check_positions(model, lengths)
    for places in length_batches(
        lengths, batch_tokens, skip, [example.input_ids for example in examples]
    ):
        batch = collate(
            [[(examples[place], False)] for place in places], pad_id(tokenizer), side="left"
        )
        noise = [_Noise(temperature, [seeds[place] for place in places])] if temperature else []
        with torch.no_grad(), own_decoding(model, tokenizer):
            output = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                **_computed_prompts(model, batch),
                max_new_tokens=max_new_tokens,
                logits_processor=LogitsProcessorList(noise),
            )
        rows = output[:, batch["input_ids"].shape[1] :].tolist()
        yield {place: _answer(tokenizer, row, stops) for place, row in zip(places, rows)}


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation config."""
    configured = causal_lm(model).generation_config.eos_token_id
    return {
        tokenizer.eos_token_id,
        *(configured if isinstance(configured, list) else [configured]),
    } - {None}


@contextmanager
def own_decoding(model: Any, tokenizer: Any) -> Iterator[None]:
    """Within it, `model.generate` follows `DECODING` and the stop tokens alone. A config that is handed to `generate`
    is filled up from the model's own, so that one has to go."""
    holders = list({id(holder): holder for holder in (model, causal_lm(model))}.values())
    before = [holder.generation_config for holder in holders]
    stops = sorted(stop_tokens(model, tokenizer))
    config = GenerationConfig(
        **DECODING, eos_token_id=stops or None, pad_token_id=pad_id(tokenizer)
    )
    for holder in holders:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, own in zip(holders, before):
            holder.generation_config = own


def check_positions(model: Any, lengths: Sequence[int]) -> None:
    """Raises ModelError where a row is longer than a model's table of positions."""
    most = position_limit(causal_lm(model).config.get_text_config())
    if most is not None and max(lengths, default=0) > most:
        raise ModelError(
            f"a row of {max(lengths)} tokens (its answer included), but the model has {most} positions; take shorter "
            "texts or answers, or another model"
        )


def _computed_prompts(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The cache, for `generate`, of all but the last token of each row's prompt: every prompt is computed once. Empty
    where no two prompts are the same, or the model's cache cannot be repeated."""
    ids_BT = batch["input_ids"]
    different, number_B = ids_BT.unique(dim=0, return_inverse=True)
    if len(different) == len(ids_BT):
        return {}
    inner = causal_lm(model)
    if not _is_cache_plain(inner):
        return {}
    first = [
        number_B.tolist().index(number) for number in range(len(different))
    ]  # a row of each prompt
    inputs = {
        name: batch[name][first, :-1] for name in ("input_ids", "attention_mask", "position_ids")
    }
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs["logits_to_keep"] = ids_BT.new_zeros(0)  # none
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    prompts: Any = cache_in(model(**inputs, use_cache=True))
    prompts.batch_select_indices(number_B.to(model.device))
    return {cache_name(inner): prompts}


def _is_cache_plain(inner: Any) -> bool:
    """Whether a model's cache holds keys and values alone. Recurrent states belong to whole rows."""
    layers = DynamicCache(config=inner.config.get_text_config(decoder=True)).layers
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return known and not inner._is_stateful


def _answer(tokenizer: Any, new_tokens: list[int], stops: set[int]) -> Generated:
    end = next((at for at, token in enumerate(new_tokens) if token in stops), None)
    return Generated(
        tokenizer.decode(new_tokens[:end], skip_special_tokens=True).strip(), end is not None
    )


class _Noise(LogitsProcessor):
    """Makes the best token a draw from softmax(logits / temperature): Gumbel noise, from a generator for each row."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # -log of an exponential variate is a Gumbel variate.
        rows = [
            torch.empty(scores.shape[1]).exponential_(generator=generator).log()
            for generator in self.generators
        ]
        return scores / self.temperature - torch.stack(rows).to(scores.device)


def forward_batches(
    lengths: list[int], batch_tokens: int, device: torch.device, skip: Container[int] = ()
) -> Iterator[list[int]]:
    """`length_batches` for one forward each: on a CPU of at most `CPU_TOKENS`, which is faster than more at once."""
    at_once = min(batch_tokens, CPU_TOKENS) if device.type == "cpu" else batch_tokens
    return length_batches(lengths, at_once, skip)


def length_batches(
    lengths: list[int],
    batch_tokens: int,
    skip: Container[int] = (),
    contents: Sequence[list[int]] = (),
) -> Iterator[list[int]]:
    """Places of the items, longest first (those of the same content together), so many together that the padded batch
    stays within `batch_tokens`; those of `skip` are taken out then."""
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
