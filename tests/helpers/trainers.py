"""Trainers of tiny models: their arguments, their defenses, what they logged, and a crash."""

import json
from pathlib import Path
from typing import Any, cast

from transformers import (
    TrainerCallback,
    TrainingArguments,
)

from helpers.rows import Items, training_rows
from ringfence.defenses import Defense, DefenseConfig, Setup
from ringfence.text.chat import Chat

RETAIN = training_rows(5, seed=50)
SETUP = Setup(cast(Chat, None), RETAIN, lambda source: RETAIN, "model")


def training_arguments(
    folder: Path, rows: int, accumulation: int, **arguments: Any
) -> TrainingArguments:
    """Of one epoch on the CPU, without schedule, clipping, checkpoints or, unless told otherwise,
    any update."""
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


def build(*configs: DefenseConfig) -> list[Defense]:
    return [config.build(SETUP) for config in configs]


def lines_of(trainer: Any) -> list[dict[str, float]]:
    return [json.loads(line) for line in trainer.log_file.read_text().splitlines()]


def step_items(trainer: Any, step: int, epoch: int = 0) -> Items:
    """The rows of one optimiser step."""
    stream = trainer.train_dataset
    stream.set_epoch(epoch)
    start = step * stream.step_rows
    return [
        item
        for at in range(start, min(start + stream.step_rows, len(stream)))
        for item in stream[at]
    ]


class Crash(TrainerCallback):
    """Ends a run from outside, after the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
