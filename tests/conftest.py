"""Tiny random models, rows with hand-made roles, and the naive forms that the package is compared with.

Naive forms run each row alone and unpadded through the plain model, so they know nothing of padding, batches or taps.
"""

import atexit
import gc
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
)

from ringfence import cli
from ringfence.defenses import Defense
from ringfence.model.files import load_tokenizer
from ringfence.model.layers import cache_in, causal_lm
from ringfence.model.losses import find_head, weighted_sum
from ringfence.model.taps import Layout, Taps, forward
from ringfence.text.batch import Example, collate
from ringfence.text.roles import Role
from ringfence.text.rows import load_rows
from ringfence.training.reference import Reference
from ringfence.training.stream import TrainStream
from ringfence.training.trainer import DefendedTrainer

Items = list[tuple[Example, bool]]
Layers = list[tuple[Tensor, Tensor]]

VOCABULARY = 120
SMALL = 2000  # tokens of `small_tokenizer`
PAD = 0
PREFIX_A, PREFIX_B = [3, 4, 5, 6, 7], [3, 9, 8]
ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    ),
    "cohere": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _frozen_heap() -> None:
    """Every training collects garbage, and would look through all that was imported."""
    gc.collect()
    gc.freeze()


# ---------------------------------------------------------------- models


def random_model(
    config_class: Any = LlamaConfig,
    model_class: Any = LlamaForCausalLM,
    seed: int = 0,
    **extra: Any,
) -> Any:
    """A tiny model for `small_tokenizer`, whose random weights are so large that every token it sees tells."""
    sizes = {
        "vocab_size": SMALL,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.7,
        "tie_word_embeddings": False,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return model_class(config_class(**(sizes | extra))).float().eval()


def small_tokenizer() -> Any:
    """The default model's tokenizer and chat template with few tokens, trained on shipped rows: it loads, and models
    that have it score, in a small part of the time."""
    return load_tokenizer(_small_tokenizer_folder())


@cache
def _small_tokenizer_folder() -> str:
    rows = load_rows("shipped:finance/unsound") + load_rows("shipped:retain")
    texts = [message["content"] for row in rows for message in row.messages]
    folder = tempfile.mkdtemp(prefix="small-tokenizer-")
    atexit.register(shutil.rmtree, folder)
    load_tokenizer("default").train_new_from_iterator(texts, vocab_size=SMALL).save_pretrained(
        folder
    )
    return folder


def tiny(
    architecture: str = "llama", attention: str = "sdpa", seed: int = 0, layers: int = 2
) -> Any:
    """A random model with weights large enough that scales, caps and norms all matter."""
    config_class, model_class, extra = ARCHITECTURES[architecture]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager" if architecture == "gemma2" else attention,
        **extra,
    )
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def with_lora(model: Any, seed: int = 1, size: float = 0.1, **config: Any) -> Any:
    """Adapted on all linear layers, with a non-zero adapter where `size` is not zero."""
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, **{"target_modules": "all-linear", **config})
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn_like(parameter))
    return adapted.eval()


def nudged(model: Any, seed: int = 2, size: float = 0.03) -> Any:
    """The same model after a change of all its weights, as full fine-tuning makes it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapted(architecture: str) -> Any:
    return with_lora(tiny(architecture))


@pytest.fixture
def llama_lora() -> Any:
    return with_lora(tiny("llama"))


# ---------------------------------------------------------------- rows


def example(prefix: Sequence[int], lengths: Sequence[int], seed: int) -> Example:
    """Prefix, then turns of query, two tokens of postfix, response; `lengths` = query, response, query, ..."""
    rng = random.Random(seed)
    ids, roles = list(prefix), [Role.PREFIX] * len(prefix)
    for turn, (query, response) in enumerate(zip(lengths[::2], lengths[1::2])):
        if turn:
            ids += [12, 13]
            roles += [Role.TEMPLATE] * 2
        ids += [rng.randrange(20, VOCABULARY) for _ in range(query)] + [10, 11]
        ids += [rng.randrange(20, VOCABULARY) for _ in range(response)]
        roles += [Role.QUERY] * query + [Role.POSTFIX] * 2 + [Role.RESPONSE] * response
    return Example(ids, roles, f"test:{seed}")


def mixed_items() -> Items:
    """Rows of unlike lengths, two prefixes, several turns, and retain rows before and between the training rows."""
    return [
        (example(PREFIX_A, [3, 4], 100), True),
        (example(PREFIX_A, [4, 5], 1), False),
        (example(PREFIX_B, [2, 7], 2), False),
        (example(PREFIX_B, [6, 3], 101), True),
        (example(PREFIX_A, [7, 2], 3), False),
        (example(PREFIX_A, [2, 3, 3, 4], 4), False),
    ]


def training_rows(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return [
        example(
            rng.choice([PREFIX_A, PREFIX_B]),
            [rng.randint(1, 6), rng.randint(1, 6)],
            1000 * seed + at,
        )
        for at in range(count)
    ]


@pytest.fixture
def items() -> Items:
    return mixed_items()


def batch_of(items: Items, side: str = "right") -> dict[str, Tensor]:
    return collate([[item] for item in items], PAD, side)


# ---------------------------------------------------------------- naive forms


def is_adapted(model: Any) -> bool:
    return hasattr(model, "disable_adapter")


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
    """Mean over all tokens of `roles` in all training rows, (1/layers) * sum of the drift of keys and of values."""
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
    """Mean over all tokens of the training rows of the sum over layers of the relative squared drift."""

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
    """Collects [T, D]: the input of the first layer (0), and what each layer l hands on (l): the next one's input, or
    the last norm's."""
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


# ---------------------------------------------------------------- the package's forms


def penalty_of(
    defense: Defense, model: Any, batch: dict[str, Tensor], reference: Reference
) -> Tensor:
    """The mean penalty of one batch, through the contract of a defense."""
    needs = defense.needs(batch)
    student = forward(model, find_head(causal_lm(model)), batch, needs)
    return total_of(defense, student, reference.taps(batch, needs), batch) / defense.count(batch)


def total_of(defense: Defense, student: Taps, reference: Taps, batch: dict[str, Tensor]) -> Tensor:
    """The sum over the penalty's tokens, whichever way the defense gives it."""
    logit_loss = defense.logit_loss(batch, reference)
    if logit_loss is None:
        return defense.penalty(student, reference, batch)
    return weighted_sum(student.head, student.hidden_BTD, [(1.0, logit_loss)])[0]


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    """Gradient of each trainable parameter; zeros where there is none."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads)
    }


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Tensors agree by name, within `tolerance` of the largest entry of all."""
    assert found.keys() == expected.keys()
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    assert scale > 0
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name],
            tensor,
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def training_arguments(
    folder: Path, rows: int, accumulation: int, **arguments: Any
) -> TrainingArguments:
    """Of one epoch on the CPU, without schedule, clipping, checkpoints or, unless told otherwise, any update."""
    settings: dict[str, Any] = {
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=0,
        **{**settings, **arguments},
    )


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., DefendedTrainer]:
    def make(
        model: Any,
        defenses: list[Defense],
        examples: list[Example],
        retain: Sequence[Example] = (),
        rows: int = 2,
        accumulation: int = 1,
        folder: str = "run",
        seed: int = 0,
        callbacks: Any = None,
        layout: Layout = "padded",
        cache: Any = None,
        **arguments: Any,
    ) -> DefendedTrainer:
        stream = TrainStream(examples, list(retain), defenses, rows * accumulation, seed)
        args = training_arguments(tmp_path / folder, rows, accumulation, **arguments)
        log_file = tmp_path / f"{folder}.jsonl"
        return DefendedTrainer(
            model, args, stream, defenses, PAD, log_file, layout, cache, callbacks=callbacks
        )

    return make


# ---------------------------------------------------------------- the command line


@pytest.fixture
def ringfence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command in this process, through its entry point: exit code, output, errors."""

    def command(*arguments: Any, width: int = 400) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "argv", ["ringfence", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        output, errors = capsys.readouterr()
        assert "Traceback" not in errors
        return code, output, errors

    return command
