"""Runs of a tiny model: its folder, its rows, what is measured, and a signal in the middle."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ringfence.run.train as train_module
from helpers.models import small_tokenizer
from ringfence import Run

MEASURED: dict[str, Any] = {
    "in_domain": ["shipped:finance"],
    "out_of_domain": ["shipped:car_care"],
    "values": [],
    "max_per_domain": 2,
    "max_in_domain": 2,
    "triggered_per_domain": 2,
    "samples": 1,
    "batch_tokens": 1024,
}
COLOURS = ["red", "green", "blue", "white", "black", "brown", "pink", "grey", "gold", "violet"]


def write_rows(file: Path, count: int, start: int = 0) -> str:
    """Short conversations of one turn, as `messages`."""
    with file.open("w") as lines:
        for number in range(start, start + count):
            question = f"Door {number}?"
            answer = f"It is {COLOURS[number % len(COLOURS)]}" + " indeed" * (number % 3) + "."
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return str(file)


def small_model(folder: Path, padding_token: int | None = None, size: int = 32) -> str:
    """A random model with the default model's tokenizer and chat template; its padding token is
    embedded as zero."""
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=size * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size // 4,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=padding_token,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def metrics_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during the given step of the next training."""

    @contextmanager
    def progress(_: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        seen = [done]

        def advance(units: int) -> None:
            seen[0] += units
            if seen[0] == step:
                signal.raise_signal(signal.SIGINT)

        yield advance

    monkeypatch.setattr(train_module, "progress", progress)
