"""What the README shows is run as it stands there."""

import functools
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ringfence
from helpers.documents import block_with, change_once, copy_of_the_package, run_copy
from helpers.runs import small_model, write_rows
from ringfence.defenses import Setup
from ringfence.model.taps import forward
from ringfence.run.config import load_recipe
from ringfence.text.batch import collate
from ringfence.text.roles import Role
from ringfence.training.reference import Reference

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples" / "recipes"

# What is measured is not what is shown.
FEW = {"max_per_domain": 2, "max_in_domain": 2, "triggered_per_domain": 2, "samples": 1}


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
    exec(block_with("README.md", "fine_tune("), {})
    number = r"[+-]?\d\.\d\d"  # 0.00 has no sign
    assert re.search(rf"{number} \[{number}, {number}\]", capsys.readouterr().out)
    assert (tmp_path / "runs" / "mine" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_defense_of_your_own(llama_lora: Any, items: Any) -> None:
    """The defense of the README, built and asked for its penalty, against the naive form."""
    module = ModuleType("ringfence.defenses.anchor")
    module.__package__ = "ringfence.defenses"
    sys.modules[module.__name__] = module
    exec(block_with("README.md", "class Anchor"), vars(module))
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
    """In a copy of the package nothing else has to be touched for the defense to be trained with,
    logged and stored."""
    package = copy_of_the_package(tmp_path)
    (package / "defenses" / "anchor.py").write_text(block_with("README.md", "class Anchor"))
    union = package / "defenses" / "__init__.py"
    added = {
        "from .base import": "from .anchor import Anchor\nfrom .base import",
        "    kl: KL | None = None\n": (
            "    kl: KL | None = None\n    anchor: Anchor | None = None\n"
        ),
    }
    for old, new in added.items():
        change_once(union, old, new)
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
    overrides = [f"{key}={value}" for key, value in settings.items()]
    done = run_copy(tmp_path, "-m", "ringfence", "train", *overrides)
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
