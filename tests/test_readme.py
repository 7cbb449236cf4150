"""What the README shows is run as it stands there."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ringfence
from ringfence.defenses import Setup
from ringfence.model.taps import forward
from ringfence.run.config import load_recipe
from ringfence.text.batch import collate
from ringfence.text.roles import Role
from ringfence.training.reference import Reference
from test_run import small_model, write_rows

pytestmark = pytest.mark.slow

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
EXAMPLES = Path(__file__).parents[1] / "examples" / "recipes"
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

# What is measured is not what is shown.
FEW = {"max_per_domain": 2, "max_in_domain": 2, "triggered_per_domain": 2, "samples": 1}


def block_with(text: str) -> str:
    return next(block for block in BLOCKS if text in block)


def test_fine_tune_in_a_few_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "model").mkdir()
    model = small_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "mine.jsonl", 9)
    monkeypatch.setattr(
        ringfence,
        "fine_tune",
        functools.partial(ringfence.fine_tune, model=model, evaluate=FEW),
        raising=False,
    )
    exec(block_with("fine_tune("), {})
    number = r"[+-]?\d\.\d\d"  # 0.00 has no sign
    assert re.search(rf"{number} \[{number}, {number}\]", capsys.readouterr().out)
    assert (tmp_path / "runs" / "mine" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_defense_of_your_own(llama_lora: Any, items: Any) -> None:
    """The defense of the README, built and asked for its penalty, against the naive form."""
    module = ModuleType("ringfence.defenses.anchor")
    module.__package__ = "ringfence.defenses"
    sys.modules[module.__name__] = module
    exec(block_with("class Anchor"), vars(module))
    defense = module.Anchor(weight=0.5).build(Setup(None, [], lambda _: [], "model"))
    batch = collate([[item] for item in items], 0)
    needs = defense.needs(batch)
    reference = Reference(llama_lora)
    student = forward(llama_lora, reference.head, batch)
    then = reference.taps(batch, needs)
    total = defense.penalty(student, then, batch)
    expected = 0.0
    for row, column in (batch["roles"] == Role.RESPONSE).nonzero().tolist():
        now, before = student.hidden_BTD[row, column], then.hidden_BTD[row, column]
        expected += float((now - before).norm() ** 2 / before.norm() ** 2)
    assert total.item() == pytest.approx(expected, rel=1e-4)
    assert total.item() > 0
    assert total.requires_grad
    assert defense.count(batch) == int((batch["roles"] == Role.RESPONSE).sum())
    assert torch.isfinite(total)


def test_a_defense_is_a_file_an_import_and_a_line(tmp_path: Path) -> None:
    """In a copy of the package nothing else has to be touched for the defense to be trained with, logged and stored."""
    package = tmp_path / "ringfence"
    shutil.copytree(
        Path(ringfence.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    (package / "defenses" / "anchor.py").write_text(block_with("class Anchor"))
    union = package / "defenses" / "__init__.py"
    added = {
        "from .base import": "from .anchor import Anchor\nfrom .base import",
        "    kl: KL | None = None\n": "    kl: KL | None = None\n    anchor: Anchor | None = None\n",
    }
    for old, new in added.items():
        assert union.read_text().count(old) == 1
        union.write_text(union.read_text().replace(old, new))
    (tmp_path / "model").mkdir()
    settings = {
        "model": small_model(tmp_path / "model"),
        "output": tmp_path / "run",
        "data.train": write_rows(tmp_path / "rows.jsonl", 6),
        "data.retain": "null",
        "data.held_out": 0,
        "train.precision": "fp32",
        "train.batch_size": 2,
        "train.learning_rate": 1e-2,
        "defenses.anchor.weight": 0.5,
    }
    command = [
        sys.executable,
        "-m",
        "ringfence",
        "train",
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    first, *_, last = (
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    )
    assert first["anchor"] == 0 < last["anchor"]
    assert last["loss"] == pytest.approx(last["ce"] + 0.5 * last["anchor"], rel=1e-3)
    assert "anchor:" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_example_recipes_are_recipes(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.output == f"runs/{file.stem}"
    assert recipe.defenses.configs()


def test_there_are_examples() -> None:
    assert len(list(EXAMPLES.glob("*.yaml"))) >= 4
