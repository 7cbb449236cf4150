"""examples/plain_loop.py: a plain loop logs and learns what the trainer does."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import PAD, tiny, with_lora
from helpers.penalties import assert_same
from helpers.rows import training_rows
from helpers.runs import metrics_of, small_model, write_rows
from helpers.trainers import RETAIN, build, lines_of
from ringfence.defenses import KL, LDIFS, DefenseConfig, Interleave, TReFT
from ringfence.run.config import parse_recipe
from ringfence.run.train import train_run
from ringfence.training.stream import TrainStream

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "examples" / "plain_loop.py"
Lines = list[dict[str, float]]

LAST_DIGIT = 6e-7  # the trainer rounds what it logs to six digits, but for the loss

ALL = (
    KL(weight=0.7, where="retain", retain_ratio=0.5),
    LDIFS(weight=0.4, layers=(1, 2)),
    TReFT(weight=3.0, tokens=("prefix", "postfix")),
    Interleave(ratio=0.3),
)
SETS: dict[str, tuple[DefenseConfig, ...]] = {
    "none": (),
    "kl": ALL[:1],
    "ldifs": ALL[1:2],
    "treft": ALL[2:3],
    "interleave": ALL[3:],
    "all": ALL,
    "every": (KL(weight=0.7, every=2), TReFT(every=3)),
    "budget": (KL(where="train", direction="forward", budget=0.02),),
}


@pytest.fixture(scope="module")
def plain_loop() -> Any:
    spec = spec_from_file_location("plain_loop", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained_weights(model: Any) -> dict[str, Tensor]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: parameter.detach().clone() for name, parameter in named}


@pytest.mark.parametrize("name", SETS)
def test_the_loop_is_the_trainer(name: str, plain_loop: Any, make_trainer: Any) -> None:
    """Two epochs, each with a short last step; warm-up, clipping and decay act."""
    configs, rows = SETS[name], training_rows(14)
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5}
    model = with_lora(tiny("llama"))
    start = trained_weights(model)
    trainer = make_trainer(
        model,
        build(*configs),
        rows,
        RETAIN,
        rows=4,
        num_train_epochs=2,
        optim="adamw_torch_fused",
        lr_scheduler_type="linear",
        warmup_steps=0.2,
        **settings,
    )
    trainer.train()
    other = with_lora(tiny("llama"))
    stream = TrainStream(rows, RETAIN, build(*configs), 4, seed=0)
    lines = plain_loop.train(other, PAD, stream, epochs=2, warmup_ratio=0.2, **settings)

    expected = lines_of(trainer)
    assert len(lines) == len(expected) >= 8
    assert_lines(lines, expected)
    penalties = {"kl", "ldifs", "treft"} & {type(config).__name__.lower() for config in configs}
    assert penalties <= {part for line in lines for part in line}
    assert max(line["grad_norm"] for line in expected) > settings["max_grad_norm"]
    weights = trained_weights(model)
    assert max((weights[each] - start[each]).abs().max().item() for each in start) > 1e-2
    assert_same(trained_weights(other), weights)


def assert_lines(found: Lines, expected: Lines, tolerance: float = 1e-5) -> None:
    """The same steps and parts, within a relative tolerance."""
    about = {"grad_norm", "learning_rate", "epoch", "seconds", "kl_weight"}  # the trainer's alone
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys() - about
        for part, value in line.items():
            least = 0.0 if part == "loss" else LAST_DIGIT
            same = pytest.approx(other[part], rel=tolerance, abs=least)
            assert value == same, (line["step"], part)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a run would not stay on the CPU")
def test_the_script_logs_what_a_run_does(plain_loop: Any, tmp_path: Path) -> None:
    """With a recipe's defaults, from the command line."""
    model, rows = small_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 12)
    retain = write_rows(tmp_path / "retain.jsonl", 4, start=50)
    told = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in told.items()]
    options += [f"--model={model}", f"--retain={retain}"]
    command = [sys.executable, str(SCRIPT), rows, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    recipe = {
        "output": str(tmp_path / "run"),
        "model": model,
        "data": {"train": rows, "retain": retain, "held_out": 0},
        "train": {**told, "precision": "fp32"},
        "defenses": plain_loop.DEFENSES.model_dump(mode="json", exclude_none=True),
        "evaluate": {"in_domain": []},
    }
    run = train_run(parse_recipe(recipe))
    assert_lines(lines, metrics_of(run), 1e-4)
    assert lines[-1]["ce"] < lines[0]["ce"]
