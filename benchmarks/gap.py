"""How long it takes to score safe rows under the default model and K adapters: batched by length, each batch under all
models before the next, against one row at a time with a switch of model after each.

    python benchmarks/gap.py [rows] [adapters]

The adapters are random (rank 32, all linear layers); what they know does not change the time.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from ringfence.chat import Chat
from ringfence.data import load_rows
from ringfence.evaluate.scoring import score_under
from ringfence.gap import adapter_folders, load_adapted, settings
from ringfence.models import load_model, load_tokenizer

MODEL, BATCH_TOKENS = "default", 4096


def save_adapters(count: int, folder: Path) -> list[str]:
    """Adapters of which each changes the model a little."""
    for number in range(count):
        torch.manual_seed(number)
        config = LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = get_peft_model(load_model(MODEL), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=1e-3)
        model.save_pretrained(folder / str(number) / "adapter")
    return [str(folder / str(number)) for number in range(count)]


def main(rows: int = 60, adapters: int = 2) -> None:
    chat, pool = Chat(load_tokenizer(MODEL)), load_rows("shipped:retain")[:rows]
    with tempfile.TemporaryDirectory() as folder:
        folders = adapter_folders(save_adapters(adapters, Path(folder)), MODEL)
        model = load_adapted(MODEL, folders, "bf16")
    each = settings(model, adapters)
    found: dict[str, dict[int, list[float]]] = {}
    seconds: dict[str, float] = {}
    for name, batch_tokens in (("one row at a time", 1), ("batched", BATCH_TOKENS)):
        next(score_under(model, chat, pool[:1], each, 1))  # warm
        started, worked = time.perf_counter(), time.process_time()
        batches = score_under(model, chat, pool, each, batch_tokens)
        found[name] = {at: [-score.mean for score in scores] for batch in batches for at, scores in batch.items()}
        seconds[name] = time.process_time() - worked  # processes beside this one hardly change it
        print(f"{name}: {time.perf_counter() - started:.1f} s, {seconds[name]:.1f} s of CPU", flush=True)
    alone, batched = found.values()
    apart = max(abs(a - b) for at in alone for a, b in zip(alone[at], batched[at]))
    faster = seconds["one row at a time"] / seconds["batched"]
    print(
        f"{rows} rows, {adapters} adapters, {torch.get_num_threads()} threads: {faster:.2f} times less CPU time; "
        f"largest difference {apart:.3f} nats per token"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
