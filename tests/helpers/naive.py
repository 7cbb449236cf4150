"""Naive forms that the package is compared with.

They run each row alone and unpadded through the plain model, so they know nothing of padding,
batches or taps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.models import is_adapted
from helpers.rows import Items
from ringfence.model.layers import cache_in
from ringfence.text.batch import Example
from ringfence.text.chat import Chat
from ringfence.text.roles import Messages, Role

Layers = list[tuple[Tensor, Tensor]]
END = "<|im_end|>"


def reference_call(model: Any, aligned: Any, call: Callable[[Any], Any]) -> Any:
    """`call` on the reference: `model` with its adapter off, or the untouched `aligned` model."""
    if not is_adapted(model):
        return call(aligned)
    with model.disable_adapter():
        return call(model)


def own_cache(model: Any, row: Example) -> Layers:
    """Keys and values of the model's own cache, [T, key heads * head size], for each layer."""
    cache = cache_in(model(input_ids=torch.tensor([row.input_ids]), use_cache=True))
    return [(_flat(layer.keys), _flat(layer.values)) for layer in cache.layers]


def _flat(states_1HTE: Tensor) -> Tensor:
    return states_1HTE[0].transpose(0, 1).flatten(1)


def naive_treft(
    model: Any, aligned: Any, items: Items, roles: Sequence[Role], of: Any = own_cache
) -> Tensor:
    """Mean over all tokens of `roles` in all training rows, (1/layers) * sum of the drift of keys
    and of values."""
    drifts = []
    for row, is_retain in items:
        if is_retain:
            continue
        with torch.no_grad():
            reference = reference_call(model, aligned, lambda m, row=row: of(m, row))
        student = of(model, row)
        for at, role in enumerate(row.roles):
            if role in roles:
                layers = [
                    sum(
                        (now[at] - then[at]).pow(2).sum() / then[at].pow(2).sum()
                        for now, then in zip(*pair)
                    )
                    for pair in zip(student, reference)
                ]
                drifts.append(torch.stack(layers).mean())
    return torch.stack(drifts).mean()


def naive_ldifs(model: Any, aligned: Any, items: Items, layers: Sequence[int]) -> Tensor:
    """Mean over tokens of training rows of the sum over layers of the relative squared drift."""

    def states(m: Any, row: Example) -> list[Tensor]:
        inner = m.get_base_model() if is_adapted(m) else m
        with residual_stream(inner) as stream:
            inner(input_ids=torch.tensor([row.input_ids]))
        return stream

    terms = []
    for row, is_retain in items:
        if not is_retain:
            with torch.no_grad():
                then = reference_call(model, aligned, lambda m, row=row: states(m, row))
            now = states(model, row)
            drifts = [
                (now[at] - then[at]).pow(2).sum(-1) / then[at].pow(2).sum(-1) for at in layers
            ]
            terms.append(torch.stack(drifts).sum(0))
    return torch.cat(terms).mean()


@contextmanager
def residual_stream(inner: Any) -> Iterator[list[Tensor]]:
    """Collects [T, D]: the input of the first layer (0), and what each layer l hands on (l): the
    next one's input, or the last norm's."""
    stream: list[Tensor] = []
    places = [*inner.model.layers, inner.model.norm]
    handles = [
        place.register_forward_pre_hook(
            lambda _m, args, kw: stream.append((args or list(kw.values()))[0][0]), with_kwargs=True
        )
        for place in places
    ]
    try:
        yield stream
    finally:
        for handle in handles:
            handle.remove()


def row_logits(model: Any, row: Example) -> Tensor:
    return model(input_ids=torch.tensor([row.input_ids])).logits[0].float()


def naive_kl(
    model: Any, aligned: Any, items: Items, where: str, tokens: str, direction: str
) -> Tensor:
    """Mean, over the predicted tokens that are chosen, of the full sum over the vocabulary."""
    terms = []
    for row, is_retain in items:
        if is_retain != (where == "retain"):
            continue
        with torch.no_grad():
            reference = reference_call(
                model, aligned, lambda m, row=row: row_logits(m, row)
            ).log_softmax(-1)
        student = row_logits(model, row).log_softmax(-1)
        for at in range(1, len(row)):
            is_response = row.roles[at] == Role.RESPONSE
            if tokens == "all" or is_response == (tokens == "response"):
                p, q = student[at - 1], reference[at - 1]
                if direction == "forward":
                    p, q = q, p
                terms.append((p.exp() * (p - q)).sum())
    return torch.stack(terms).mean()


def naive_ce(model: Any, items: Items) -> Tensor:
    """Mean over the response tokens of the training rows."""
    terms = []
    for row, is_retain in items:
        if not is_retain:
            chosen = [at for at in range(1, len(row)) if row.roles[at] == Role.RESPONSE]
            targets = torch.tensor([row.input_ids[at] for at in chosen])
            terms.append(
                F.cross_entropy(
                    row_logits(model, row)[[at - 1 for at in chosen]], targets, reduction="none"
                )
            )
    return torch.cat(terms).mean()


def naive_score(model, chat, messages, answer):
    """(sum of log-probabilities, tokens) of one answer with its end of turn, alone in a row."""
    prompt = chat.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = chat.tokenizer(prompt + answer + END)["input_ids"]
    start = len(chat.tokenizer(prompt)["input_ids"])
    assert chat.tokenizer.decode(ids[start:]) == answer + END
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids))), len(ids) - start


def naive_greedy(model, chat, messages, max_new_tokens, stops=(2,)):
    """(text, new tokens with the stop): the best token after the plain logits, one row, one token
    at a time."""
    prompt = chat.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = chat.tokenizer(prompt)["input_ids"]
    new = []
    while len(new) < max_new_tokens and not (new and new[-1] in stops):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return chat.tokenizer.decode(new, skip_special_tokens=True).strip(), new


def naive_states(model: Any, chat: Chat, prompt: Messages, answer: str) -> Tensor:
    """[L, N, D]: stream after each layer at the response tokens, of one unpadded conversation."""
    encoded = chat.encode([*prompt, {"role": "assistant", "content": answer}])
    chosen = [at for at, role in enumerate(encoded.roles) if role == Role.RESPONSE]
    with torch.no_grad(), residual_stream(model) as stream:
        model(input_ids=torch.tensor([encoded.input_ids]))
    return torch.stack(stream[1:])[:, chosen]
