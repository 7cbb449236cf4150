"""One of several processes that train together, for test_distributed.py; or the single process they are compared with.

Run as `python distributed_worker.py FOLDER KIND ...` under RANK and WORLD_SIZE: trains every case in every kind (`ddp`,
`fsdp`) and writes FOLDER/KIND/CASE.pt. Knows no expected values.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import PAD, training_rows
from conftest import tiny as tiny_model
from conftest import with_lora as lora
from transformers import TrainerCallback, TrainingArguments

from ringfence.data import Example
from ringfence.defenses import Defense, Setup
from ringfence.ranks import is_main, join, wait, whole
from ringfence.stream import TrainStream
from ringfence.trainer import DefendedTrainer

STEP_ROWS = 4  # over all ranks
RETAIN = training_rows(5, seed=9)


@dataclass
class Case:
    """What is trained. `defenses(folder)` builds them; `world` rows of a step are shared by ranks and accumulation."""

    defenses: Callable[[Path], list[Defense]]
    method: str = "lora"
    rows: int = 10  # steps of 4, 4 and 2 rows
    accumulation: int = 1
    tied: bool = False
    architecture: str = "llama"
    lora: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    examples: list[Example] | None = None

    def model(self) -> Any:
        model = tiny_model(self.architecture)
        if self.tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        return lora(model, **self.lora) if self.method == "lora" else model


class Recorder(TrainerCallback):
    """Keeps the whole gradient of every step, as the optimiser sees it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        named = self.trainer.accelerator.unwrap_model(self.trainer.model).named_parameters()
        self.gradients.append({n: whole(p.grad).clone() for n, p in named if p.requires_grad})


def train_case(case: Case, folder: Path, world: int, resume: int | None = None, stop: int | None = None) -> Any:
    """Trains and returns lines of the log, gradients and final weights; `resume` from that step's checkpoint."""
    torch.manual_seed(0)
    model, defenses = case.model(), case.defenses(folder)
    examples = case.examples or training_rows(case.rows)
    stream = TrainStream(examples, RETAIN, defenses, STEP_ROWS * case.accumulation, 0)
    settings: dict[str, Any] = {
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    args = TrainingArguments(
        str(folder / "checkpoints"),
        per_device_train_batch_size=STEP_ROWS // world,
        gradient_accumulation_steps=case.accumulation,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        ddp_find_unused_parameters=False,
        **{**settings, **case.arguments},
    )
    recorder = Recorder()
    trainer = DefendedTrainer(
        model, args, stream, defenses, PAD, folder / "metrics.jsonl", callbacks=[recorder, *([Stop(stop)] if stop else [])]
    )
    recorder.trainer = trainer
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoints/checkpoint-{resume}") if resume else None)
    plain = trainer.accelerator.unwrap_model(trainer.model)
    for defense in defenses:
        defense.finish(plain)
    weights = {name: whole(p.detach()).clone() for name, p in plain.named_parameters()}
    wait()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "lines": [line for line in lines if "loss" in line],
        "gradients": recorder.gradients,
        "weights": weights,
        "states": {d.name: d.state_dict() for d in defenses},
        "kind": type(trainer.model_wrapped).__name__,
    }


class Stop(TrainerCallback):
    """Ends a run after the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def switch(kind: str) -> None:
    """What `accelerate launch` would say by its environment."""
    for name, value in FSDP.items():
        if kind == "fsdp":
            os.environ[name] = value
        else:
            os.environ.pop(name, None)


def main() -> None:
    from distributed_cases import CASES

    torch.set_num_threads(1)
    folder, kinds, names = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:] or list(CASES)
    join()
    for kind in kinds:
        switch(kind)
        for name in names:
            place = folder / kind / name
            if is_main():
                place.mkdir(parents=True, exist_ok=True)
            wait()
            found = train_case(CASES[name], place, int(os.environ["WORLD_SIZE"]))
            if is_main():
                torch.save(found, place / "found.pt")
            print(kind, name, "done", flush=True)


if __name__ == "__main__":
    main()
