"""All defenses that can stand together do so in one run: each does its work, and the forwards of a
row do not grow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.runs import metrics_of, small_model, write_rows
from ringfence.model.directions import Directions
from ringfence.run.config import parse_recipe
from ringfence.run.train import train_run
from ringfence.training import reference as reference_module
from ringfence.training import trainer as trainer_module

pytestmark = pytest.mark.slow

PENALTIES = {"kl": {"retain_ratio": 0.5}, "ldifs": {}}
SETS: dict[str, dict[str, Any]] = {
    "steered": {
        "treft": {},
        "steering": {},
        "ablation": {"layers": 2},
        "interleave": {"ratio": 0.25},
        "inoculation": {},
    },
    "frozen": {
        "treft": {"tokens": ["postfix"]},
        "frozen_prefix": {},
        "interleave": {"ratio": 0.25},
    },
    "projected": {"treft": {}, "subspace_lock": {}, "safelora": {"lowest": 14}},
}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("aligned"))


@pytest.fixture(scope="module")
def base(aligned: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("base")
    model = AutoModelForCausalLM.from_pretrained(aligned)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(aligned).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("directions") / "vectors.safetensors"
    torch.manual_seed(6)
    Directions(torch.randn(2, 1, 32), torch.ones(2), "a trait", "a model", 3, 3).save(file)
    return str(file)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", SETS)
def test_one_run_with_many_defenses(
    name: str, method: str, aligned: str, base: str, vectors: str, tmp_path: Path, monkeypatch: Any
) -> None:
    if name == "frozen" and method == "full":
        pytest.skip("a frozen prefix needs an adapter")
    defenses = {key: dict(fields) for key, fields in {**PENALTIES, **SETS[name]}.items()}
    for key in ("steering", "ablation", "subspace_lock"):
        if key in defenses:
            defenses[key]["vectors"] = vectors
    if name == "steered":
        defenses["steering"]["layers"] = 1
    if "safelora" in defenses:
        defenses["safelora"]["base"] = base
    counts = {"student": 0, "reference": 0, "steps": 0}
    for module, who in ((trainer_module, "student"), (reference_module, "reference")):
        monkeypatch.setattr(module, "forward", counted(module.forward, counts, who))
    monkeypatch.setattr(
        trainer_module.DefendedTrainer,
        "training_step",
        counted(trainer_module.DefendedTrainer.training_step, counts, "steps"),
    )
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    run = train_run(
        parse_recipe(
            {
                "model": aligned,
                "output": str(tmp_path / "run"),
                "data": {"train": rows, "retain": rows},
                "train": {
                    "method": method,
                    "precision": "fp32",
                    "learning_rate": 1e-3,
                    "batch_size": 4,
                    "epochs": 2,
                },
                "defenses": defenses,
            }
        )
    )
    assert counts["steps"] >= 6
    # The rows, and the retain rows.
    assert counts["student"] == counts["reference"] == 2 * counts["steps"]
    lines = metrics_of(run)
    for penalty in ("kl", "ldifs", "treft"):
        assert lines[-1][penalty] > 0
    if name == "projected":
        assert_locked(run, vectors, aligned)


def counted(call: Any, counts: dict[str, int], who: str) -> Any:
    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[who] += 1
        return call(*args, **kwargs)

    return counting


def assert_locked(run: Any, vectors: str, aligned: str) -> None:
    """SafeLoRA projects once more at the end; what is locked stays so."""
    basis = Directions.load(Path(vectors))
    [file] = run.weights.glob("*.safetensors")
    tensors = load_file(file)
    start = load_file(Path(aligned) / "model.safetensors")
    checked = 0
    for key, tensor in tensors.items():
        if ("o_proj" in key or "down_proj" in key) and "lora_A" not in key:
            layer = int(key.split("layers.")[1].split(".")[0])
            update = tensor if "lora_B" in key else tensor - start[key]
            written = basis.basis(layer + 1).T @ update
            assert update.abs().max() > 1e-6
            assert written.norm() < 1e-5 * max(1.0, float(update.norm()))
            checked += 1
    assert checked == 4
