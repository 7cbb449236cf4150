"""New answers of any model, batched by length."""

import inspect
import json
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..text.batch import Example, collate
from ..text.chat import Chat
from ..text.roles import Messages
from .files import pad_id
from .layers import cache_in, cache_name, causal_lm, is_cache_plain
from .scoring import Advance, check_positions, length_batches

# How models generate, whatever their own generation configs say: the most likely token, or a draw
# from the whole distribution at the temperature; nothing else changes a probability.
DECODING = {"num_beams": 1, "do_sample": False, "use_cache": True, "repetition_penalty": 1.0}
GREEDY = {"temperature": 0, **DECODING}


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
    """An answer, and whether it ended its turn (otherwise the token limit cut it off)."""

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

    A prompt that occurs several times in a batch (samples of one question) is computed once; equal
    prompts are batched together. Models whose cache cannot be repeated (recurrent states) compute
    each.

    Args:
        prompts: conversations that end with a user message.
        temperature: 0 = greedy; otherwise each answer is drawn with its prompt's seed, whatever it
            is batched with.
        skip: places of prompts that need no answer; see `scoring.score_under`.

    Yields:
        For each batch, the answers by the prompt's place.
    """
    encode = cache(lambda text: chat.encode(json.loads(text), generation=True))
    encoded = [encode(json.dumps(messages)) for messages in prompts]
    examples = [Example(e.input_ids, e.roles, "prompt") for e in encoded]
    tokenizer = chat.tokenizer
    stops = stop_tokens(model, tokenizer)
    lengths = [len(example) + max_new_tokens for example in examples]
    check_positions(model, lengths)
    contents = [example.input_ids for example in examples]
    for places in length_batches(lengths, batch_tokens, skip, contents):
        bundles = [[(examples[place], False)] for place in places]
        batch = collate(bundles, pad_id(tokenizer), side="left")
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
    """The tokens that end an answer: the tokenizer's, and those of the model's generation
    config."""
    configured = causal_lm(model).generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {tokenizer.eos_token_id, *configured} - {None}


@contextmanager
def own_decoding(model: Any, tokenizer: Any) -> Iterator[None]:
    """Within it, `model.generate` follows only `DECODING` and the stop tokens. `generate` fills a
    config it is given from the model's own, so that one has to go."""
    holders = list({id(holder): holder for holder in (model, causal_lm(model))}.values())
    before = [holder.generation_config for holder in holders]
    stops = sorted(stop_tokens(model, tokenizer))
    pad = pad_id(tokenizer)
    config = GenerationConfig(**DECODING, eos_token_id=stops or None, pad_token_id=pad)
    for holder in holders:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, own in zip(holders, before):
            holder.generation_config = own


def _computed_prompts(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """For `generate`: the cache of all but the last token of each row's prompt, where every
    distinct prompt is computed once. Empty if no two prompts are equal, or the model's cache cannot
    be repeated."""
    ids_BT = batch["input_ids"]
    different, number_B = ids_BT.unique(dim=0, return_inverse=True)
    if len(different) == len(ids_BT):
        return {}
    inner = causal_lm(model)
    if not is_cache_plain(inner):
        return {}
    numbers = number_B.tolist()
    first = [numbers.index(number) for number in range(len(different))]  # a row of each prompt
    inputs = {
        name: batch[name][first, :-1] for name in ("input_ids", "attention_mask", "position_ids")
    }
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs["logits_to_keep"] = ids_BT.new_zeros(0)  # none
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    prompts: Any = cache_in(model(**inputs, use_cache=True))
    prompts.batch_select_indices(number_B.to(model.device))
    return {cache_name(inner): prompts}


def _answer(tokenizer: Any, new_tokens: list[int], stops: set[int]) -> Generated:
    end = next((at for at, token in enumerate(new_tokens) if token in stops), None)
    return Generated(
        tokenizer.decode(new_tokens[:end], skip_special_tokens=True).strip(), end is not None
    )


class _Noise(LogitsProcessor):
    """Turns the best token into a draw from softmax(logits / temperature) by Gumbel noise, from one
    generator per row."""

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
