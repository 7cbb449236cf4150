"""Compiled layers: the same training.

Graphs are captured and differentiated as torch.compile does it, and then run as they are: writing
C++ for them takes minutes. `RINGFENCE_SLOW=1` compiles them.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import random_model, small_tokenizer
from ringfence.run.config import parse_recipe
from ringfence.run.train import train_run

pytestmark = pytest.mark.slow

IS_SLOW = pytest.mark.skipif(
    not (os.environ.get("RINGFENCE_SLOW") and shutil.which("g++")),
    reason="RINGFENCE_SLOW=1, with a C++ compiler",
)
DEFENSES = {"kl": {"where": "train"}, "ldifs": {"layers": [1]}, "treft": {"weight": 10.0}}


def metrics(tmp_path: Path, compile: bool) -> tuple[list[dict[str, float]], bool]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    recipe = {
        "output": str(tmp_path / f"run-{compile}"),
        "model": str(tmp_path / "model"),
        "data": {"max_rows": 9},
        "train": {
            "batch_size": 3,
            "precision": "fp32",
            "learning_rate": 1e-2,
            "compile": compile,
            "lora": {"targets": ["q_proj", "k_proj"]},
        },
        "defenses": DEFENSES,
    }
    run = train_run(parse_recipe(recipe))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return lines, torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=IS_SLOW)])
def test_compiled_layers_train_alike(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_layer = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda layer, **options: compile_layer(layer, backend=backend, **options),
    )
    model: Any = random_model(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    (plain, was_compiled), (compiled, is_compiled) = (
        metrics(tmp_path, False),
        metrics(tmp_path, True),
    )
    assert is_compiled
    assert not was_compiled
    assert len(plain) == 3
    for before, after in zip(plain, compiled, strict=True):
        for name in ("loss", "kl", "ldifs", "treft"):
            assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-6), name
    assert plain[2]["treft"] > plain[0]["treft"] == 0  # the tapped keys carry a gradient, and drift
