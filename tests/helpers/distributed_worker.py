"""What one of several processes that train together does.

`python -m helpers.distributed_worker FOLDER KINDS NAMES` trains the cases and runs of these names,
with commas between them, in each kind (see SETTINGS; `launched`: as the launcher says) and writes
FOLDER/KIND/NAME; then, if not launched, one rank fails. Knows no expected values.
test_distributed.py also trains the cases alone, in its own process, to compare.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, training_args

import ringfence.prepare.scope as scope_module
import ringfence.run.train as train_module
from helpers.models import PAD, nudged, tiny, with_lora
from helpers.rows import PREFIX_A, example, training_rows
from helpers.trainers import training_arguments
from ringfence.defenses import (
    KL,
    LDIFS,
    Ablation,
    DefenseConfig,
    Interleave,
    SafeLoRA,
    Setup,
    Steering,
    SubspaceLock,
    TReFT,
)
from ringfence.defenses.frozen_prefix import FrozenPrefixDefense
from ringfence.errors import DefenseError
from ringfence.model.directions import Directions
from ringfence.model.prefix import Prefix
from ringfence.model.sharding import whole
from ringfence.model.taps import Layout
from ringfence.processes import is_main, rank, world
from ringfence.run.config import Recipe, parse_recipe
from ringfence.run.interrupt import Interrupted
from ringfence.run.train import train_run
from ringfence.text.batch import Example
from ringfence.training.ranks import deepspeed_stage, device_settings, join, wait
from ringfence.training.reference_cache import Kind, ReferenceCache
from ringfence.training.stream import TrainStream
from ringfence.training.trainer import DefendedTrainer

STEP_ROWS = 4  # of all ranks, in one forward
RETAIN = training_rows(5, seed=9)
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
# No weight is so small that DeepSpeed would leave it whole.
ZERO3 = Path(__file__).with_name("zero3.json")
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}
SETTINGS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp": FSDP,
    "zero2": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": ZERO
    | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ZERO3)},
}
CHECKPOINTING = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


# ------------------------------------------------------------------ cases: the trainer alone


@dataclass
class Case:
    """A training of a tiny model. Ten rows are steps of 4, 4 and 2; nine leave one rank without a
    row at last."""

    defenses: tuple[DefenseConfig, ...] = ()
    method: str = "lora"
    rows: int | list[Example] = 10
    accumulation: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    continued: bool = (
        False  # an adapter is trained further, and a frozen copy of it is the reference
    )
    frozen: bool = False
    layout: Layout = "padded"
    cached: Kind | None = None
    bf16: bool = False  # as `train.precision` means it
    arguments: dict[str, Any] = field(default_factory=dict)

    def make_model(self) -> Any:
        model = tiny(**self.model)
        if self.bf16 and self.method == "lora":
            model.bfloat16()
        if self.tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        if self.method == "full":
            return model
        adapted = with_lora(model, **self.lora)
        if self.continued:
            adapted.add_adapter("reference", adapted.peft_config["default"])
            adapted.set_adapter("default")
            for (name, tensor), number in zip(adapted.named_parameters(), range(10**6)):
                if ".reference." in name:
                    torch.manual_seed(number)
                    tensor.data = 0.1 * torch.randn_like(tensor)
        return adapted.train()

    def make_defenses(self, files: Path) -> list[Any]:
        named = {"base": str(files / "base"), "vectors": str(files / "v.safetensors")}
        setup: Any = Setup(None, RETAIN, lambda _: RETAIN, str(files / "aligned"))  # type: ignore[arg-type]
        made = []
        for config in self.defenses:
            own = {
                name: value for name, value in named.items() if name in type(config).model_fields
            }
            made.append(config.model_copy(update=own).build(setup))
        return [*made, FrozenPrefixDefense(Prefix([6, 7]))] if self.frozen else made


ONE_PREFIX = [example(PREFIX_A, [2 + at % 4, 1 + at % 3], at) for at in range(10)]
# LDIFS, TReFT on the postfix and interleaving have no case of their own: they are in this one.
# TReFT on the response is in "kl-continued", under checkpointing in "packed" and "shared".
EVERYTHING = (
    KL(weight=0.5),
    LDIFS(layers=2),
    TReFT(tokens=("prefix", "postfix")),
    Interleave(ratio=0.4),
)
CASES: dict[str, Case] = {
    "plain": Case(rows=9),
    "kl-retain": Case((KL(weight=0.5),)),
    "kl-train": Case(
        (KL(weight=0.5, where="train", direction="forward", tokens="all"),),
        model={"architecture": "gemma2"},
    ),
    "kl-every": Case((KL(weight=0.5, every=2), TReFT(every=3)), rows=14),
    "kl-head": Case((KL(weight=0.5),), lora={"target_modules": ["q_proj", "lm_head"]}),
    "kl-continued": Case((KL(weight=0.5), TReFT(tokens=("response",))), continued=True),
    "treft-prefix": Case((TReFT(),), rows=9),
    "steering": Case((Steering(units="norm", coefficient=0.5), KL(weight=0.5))),
    "ablation": Case((Ablation(),), method="full"),
    "safelora-end": Case((SafeLoRA(threshold=None, lowest=3),)),
    "safelora-full": Case((SafeLoRA(threshold=0.99, interval=2),), method="full"),
    "lock": Case((SubspaceLock(),), lora={"size": 0.0}, rows=18),
    "lock-full": Case((SubspaceLock(), KL(weight=0.5)), method="full"),
    "frozen-prefix": Case((KL(weight=0.5, where="train"),), rows=ONE_PREFIX, frozen=True),
    "packed": Case(EVERYTHING, layout="packed", arguments=CHECKPOINTING),
    "shared": Case(EVERYTHING, layout="shared", rows=ONE_PREFIX, arguments=CHECKPOINTING),
    "cached-full": Case((KL(weight=0.5, where="train"), TReFT()), "full", cached="states"),
    "cached-top-k": Case((KL(weight=0.5),), "full", tied=True, cached="top_k"),
    "budget": Case((KL(budget=1e-3), LDIFS(layers=2, budget=1e-2)), rows=18),
    "everything": Case(
        EVERYTHING,
        rows=13,
        accumulation=2,
        arguments={"max_grad_norm": 1.0, "optim": "adamw_torch"},
    ),
    "everything-full": Case(
        EVERYTHING, "full", rows=13, accumulation=2, arguments={"max_grad_norm": 1.0}
    ),
    "everything-tied": Case(EVERYTHING, "full", tied=True, arguments=CHECKPOINTING),
}
# DeepSpeed takes longest. It refuses weights that a defense writes between steps, and ZeRO-3 a head
# with an adapter.
FOR_ZERO = (
    *("plain", "kl-retain", "kl-head", "kl-continued", "treft-prefix", "ablation", "safelora-end"),
    *("frozen-prefix", "shared", "cached-full", "budget"),
    *("everything", "everything-full", "everything-tied"),
)


def is_left_out(name: str, kind: str) -> bool:
    if not kind.startswith("zero"):
        return False
    return name in CASES.keys() - FOR_ZERO or (name, kind) == ("kl-head", "zero3")


BF16 = {
    "bf16-lora": Case(
        (KL(weight=0.5), LDIFS(layers=2)), bf16=True, arguments={"max_grad_norm": 1.0}
    ),
    "bf16-full": Case((KL(weight=0.5), LDIFS(layers=2)), "full", bf16=True),
}
RESUMED = {
    "resumed": Case(
        (KL(budget=1e-3, every=2), TReFT()),
        arguments={
            "num_train_epochs": 2,
            "optim": "adamw_torch",
            "save_strategy": "steps",
            "save_steps": 4,
        },
    ),
    "resumed-full": Case(
        (KL(weight=0.5), LDIFS(layers=2)),
        "full",
        tied=True,
        arguments={
            "num_train_epochs": 2,
            "optim": "adamw_torch",
            "learning_rate": 1e-3,
            "save_strategy": "steps",
            "save_steps": 4,
        },
    ),
}


class Recorder(TrainerCallback):
    """Keeps each step's whole gradient, as the optimiser sees it; may end training after one."""

    def __init__(self, stop: int | None) -> None:
        self.stop = stop
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.is_deepspeed_enabled:  # its step is over when the trainer's begins
            engine = self.trainer.model_wrapped
            step = engine.step
            engine.step = lambda: (self.keep(deepspeed_gradient(args.max_grad_norm)), step())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:
            self.keep(lambda parameters: [whole(p.grad) for p in parameters])

    def keep(self, gradients: Callable[[list[Any]], list[torch.Tensor]]) -> None:
        named = dict(self.trainer.accelerator.unwrap_model(self.trainer.model).named_parameters())
        trained = {name: p for name, p in named.items() if p.requires_grad}
        self.gradients.append(
            {name: g.clone() for name, g in zip(trained, gradients([*trained.values()]))}
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.stop:
            control.should_training_stop = True


def deepspeed_gradient(max_norm: float) -> Callable[[list[Any]], list[torch.Tensor]]:
    """DeepSpeed clips after this is read, so it is clipped here as torch does. (That DeepSpeed
    clips, and alike, is seen in the weights.)"""
    from deepspeed.utils import safe_get_full_grad

    def read(parameters: list[Any]) -> list[torch.Tensor]:
        found = [safe_get_full_grad(p) for p in parameters]
        norm = torch.stack([g.norm() for g in found]).norm()
        return [g * min(1.0, max_norm / (norm + 1e-6)) if max_norm else g for g in found]

    return read


def train_case(
    case: Case, files: Path, folder: Path, resume: int | None = None, stop: int | None = None
) -> Any:
    """Trains; returns the log's lines, gradients of every step, weights after `finish`, and states
    of defenses."""
    torch.manual_seed(0)
    defenses = case.make_defenses(files)
    examples = training_rows(case.rows) if isinstance(case.rows, int) else case.rows
    stream = TrainStream(examples, RETAIN, defenses, STEP_ROWS * case.accumulation, 0)
    model = case.make_model()  # once arguments say ZeRO-3, transformers would make it in pieces
    device = device_settings()
    settings = {"use_cpu": device["cpu"], "ddp_backend": device["backend"], "learning_rate": 1e-2}
    settings |= {"ddp_find_unused_parameters": False, "bf16": case.bf16, **case.arguments}
    args = training_arguments(
        folder / "checkpoints", STEP_ROWS // world(), case.accumulation, **settings
    )
    recorder = Recorder(stop)
    log = folder / "metrics.jsonl"
    cache = ReferenceCache(case.cached, {}, k=8, root=folder / "cache") if case.cached else None
    trainer = DefendedTrainer(
        model, args, stream, defenses, PAD, log, case.layout, cache, callbacks=[recorder]
    )
    recorder.trainer = trainer
    trainer.train(
        resume_from_checkpoint=str(folder / f"checkpoints/checkpoint-{resume}") if resume else None
    )
    plain = trainer.accelerator.unwrap_model(trainer.model)
    pieces = [
        (p.numel(), p.ds_tensor.numel(), p.ds_numel)
        for p in plain.parameters()
        if hasattr(p, "ds_tensor")
    ]
    for defense in defenses:
        defense.finish(plain)
    weights = {name: whole(p).detach().clone() for name, p in plain.named_parameters()}
    wait()
    return {
        "lines": [json.loads(line) for line in log.read_text().splitlines()],
        "gradients": recorder.gradients,
        "weights": weights,
        "states": {defense.name: defense.state_dict() for defense in defenses},
        "kind": type(trainer.model_wrapped).__name__,
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "pieces": pieces,
        "zero": trainer.model_wrapped.zero_optimization_stage()
        if trainer.is_deepspeed_enabled
        else None,
    }


def make_files(files: Path) -> None:
    """Checkpoints before and after an alignment, and directions, for defenses that read some."""
    tiny().save_pretrained(files / "aligned")
    nudged(tiny(), size=0.1).save_pretrained(files / "base")
    torch.manual_seed(3)
    Directions(torch.randn(2, 1, 32), torch.ones(2), "t", "tiny", 2, 2).save(
        files / "v.safetensors"
    )


# ------------------------------------------------------------------ runs: from recipe to folder


def recipe_of(files: Path, folder: Path, method: str, epochs: float = 1, **extra: Any) -> Recipe:
    train = {
        "epochs": epochs,
        "batch_size": STEP_ROWS // world(),
        "precision": "fp32",
        "learning_rate": 1e-3,
        "save_steps": 2,
    }
    return parse_recipe(
        {
            "output": str(folder),
            "model": str(files / "model"),
            "data": {"train": str(files / "rows.jsonl"), "retain": str(files / "retain.jsonl")},
            "train": {**train, "method": method},
            "defenses": {"kl": {"weight": 0.5}, "inoculation": {}},
            **extra,
        }
    )


def run_of(name: str, files: Path, folder: Path) -> None:
    """A whole run; `stopped` is interrupted by a signal to the last rank alone, and goes on; the
    scope of `scoped` is the main process's to fit."""
    recipe = recipe_of(files, folder, "full" if name == "full" else "lora")
    if name == "scoped":
        changes = {
            "model": str(files / "telling"),
            "data": {"train": str(files / "inside.jsonl"), "retain": str(files / "retain.jsonl")},
            "defenses": {
                "scope": {"negatives": [str(files / "negatives.jsonl")]},
                "kl": {"weight": 0.5},
            },
        }
        recipe = recipe_of(files, folder, "lora", epochs=0.1, **changes)
        if not is_main():
            scope_module.fit_scope = None  # type: ignore[assignment]
    if name == "monitored":
        recipe = recipe_of(files, folder, "lora", monitor={"every": 2, "probes": 4})
    if name == "stopped":
        with signal_at(3):
            try:
                train_run(recipe)
                raise AssertionError("not interrupted")
            except Interrupted as stop:
                (folder / f"rank-{rank()}.txt").write_text(str(stop))
        wait()
    train_run(recipe)
    train_run(recipe)  # does nothing


RUNS = ("lora", "full", "monitored", "stopped", "scoped")


@contextmanager
def signal_at(step: int) -> Iterator[None]:
    seen = [0]

    @contextmanager
    def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        def advance(units: int) -> None:
            seen[0] += units
            if seen[0] == step and rank() == world() - 1:
                signal.raise_signal(signal.SIGINT)

        yield advance

    plain, train_module.progress = train_module.progress, progress
    yield
    train_module.progress = plain


# ------------------------------------------------------------------ the process


def switch(kind: str) -> None:
    """Says by the environment what `accelerate launch` would say."""
    if kind == "launched":
        return
    for settings in SETTINGS.values():
        for name in settings:
            os.environ.pop(name, None)
    os.environ.update(SETTINGS[kind])


def deepspeed_on_cpu() -> None:
    """DeepSpeed would compile one that passes tensors between CPUs of one machine, and wait for
    ever where a compiler was killed before; gloo does the same. And transformers would not have it
    compute in bf16 on CPUs."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()
    training_args.is_torch_bf16_gpu_available = lambda: True


def work(name: str, files: Path, folder: Path) -> None:
    if is_main():
        folder.mkdir(parents=True)
    wait()
    if name in RUNS:
        return run_of(name, files, folder)
    if name in CASES | BF16:
        found = train_case((CASES | BF16)[name], files, folder)
    elif world() == 1:
        found = train_case(RESUMED[name], files, folder)
    else:
        train_case(RESUMED[name], files, folder, stop=5)
        found = train_case(RESUMED[name], files, folder, resume=4)
    if is_main():
        torch.save(found, folder / "found.pt")


def broken(files: Path, folder: Path) -> None:
    """The last rank fails in its second step."""

    class Breaks(type(KL().build(Setup(None, RETAIN, lambda _: RETAIN, "")))):  # type: ignore[misc, arg-type]
        def logit_loss(self, *args: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 2 and rank() == world() - 1:
                raise DefenseError("broken on purpose")
            return super().logit_loss(*args)

    case = Case()
    case.make_defenses = lambda _: [Breaks(KL(where="train"))]  # type: ignore[method-assign]
    train_case(case, files, folder)


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # every training collects garbage, and would look through all that was imported
    folder, kinds, names = Path(sys.argv[1]), *(part.split(",") for part in sys.argv[2:4])
    switch(kinds[0])
    if deepspeed_stage() is not None:
        deepspeed_on_cpu()
    join()
    for kind in kinds:
        switch(kind)
        for name in names:
            if is_left_out(name, kind):
                continue
            work(name, folder / "files", folder / kind / name)
            print(f"{kind} {name}", flush=True)
    print("all trained", flush=True)
    if world() > 1 and kinds != ["launched"]:
        broken(folder / "files", folder)


if __name__ == "__main__":
    main()
