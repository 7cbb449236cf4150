"""Training an adapter further (the reference is the base with that adapter), and training over a
base in 4 bits."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.models import with_lora
from helpers.penalties import assert_same, gradients
from helpers.runs import MEASURED, metrics_of, small_model, write_rows
from ringfence import Run
from ringfence.errors import RecipeError
from ringfence.model.loading import load_model
from ringfence.run.config import parse_recipe
from ringfence.run.evaluate import evaluate_run
from ringfence.run.train import train_run

pytestmark = pytest.mark.slow

SMALL = {**MEASURED, "triggers": False, "samples": 0, "fluency": None}


def recipe(model: str, output: Path, **changes: Any) -> Any:
    rows = write_rows(output.parent / "rows.jsonl", 16)
    train = {
        "learning_rate": 1e-2,
        "batch_size": 4,
        "precision": "fp32",
        **changes.pop("train", {}),
    }
    data = {"train": rows, "retain": rows}
    return parse_recipe(
        {"model": model, "output": str(output), "data": data, "train": train, **changes}
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def first(base: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_run(recipe(base, tmp_path_factory.mktemp("runs") / "first"))


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.weights / "adapter_model.safetensors")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_trained_further_is_held_near_itself(
    first: Run, tmp_path: Path, checkpointing: bool
) -> None:
    defenses = {"kl": {"where": "train"}, "treft": {}, "ldifs": {}}
    second = train_run(
        recipe(
            str(first.weights),
            tmp_path / "second",
            defenses=defenses,
            train={"gradient_checkpointing": checkpointing},
        )
    )
    lines = metrics_of(second)
    for name in defenses:
        assert abs(lines[0][name]) < 1e-6  # base plus adapter, not the base
        assert lines[-1][name] > 1e-5
    start, end = adapter(first), adapter(second)
    assert start.keys() == end.keys()
    assert max((end[name] - start[name]).abs().max() for name in start) > 1e-3
    config = json.loads((second.weights / "adapter_config.json").read_text())
    assert (
        config["base_model_name_or_path"]
        == json.loads((first.weights / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
    )
    assert sorted(file.name for file in second.weights.iterdir() if file.is_dir()) == []


def test_without_steps_worth_mentioning_it_measures_as_its_own_reference(
    first: Run, tmp_path: Path
) -> None:
    """The reference that evaluation loads is the base plus the adapter, too."""
    again = train_run(
        recipe(
            str(first.weights), tmp_path / "again", train={"learning_rate": 1e-12}, evaluate=SMALL
        )
    )
    evaluate_run(again)
    for paired in again.summary().sets.values():
        assert abs(paired.shift.mean) < 1e-5


def test_a_stopped_further_training_resumes_to_the_same_adapter(
    first: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    from ringfence.run import train as run_module

    def trained(folder: str, stop: bool = False) -> Run:
        further = recipe(
            str(first.weights),
            tmp_path / folder,
            defenses={"kl": {"where": "train"}},
            train={"save_steps": 2, "epochs": 2},
        )
        if stop:
            with monkeypatch.context() as patch:
                patch.setattr(run_module, "_record_training", lambda *_: 1 / 0)
                patch.setattr(run_module.Run, "weights", property(lambda _: 1 / 0))
                with pytest.raises(ZeroDivisionError):
                    train_run(further)
        return train_run(further)

    whole, stopped = adapter(trained("whole")), adapter(trained("stopped", stop=True))
    for name, tensor in whole.items():
        torch.testing.assert_close(stopped[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"method": "full"}}, "is an adapter, which is trained further as it is"),
        ({"train": {"lora": {"rank": 8}}}, "leave train.method and train.lora out"),
        (
            {"defenses": {"frozen_prefix": {}}},
            "frozen_prefix would take its base for the reference",
        ),
        (
            {"defenses": {"subspace_lock": {}}},
            "subspace_lock would take its base for the reference",
        ),
    ],
)
def test_what_does_not_go_with_an_adapter(
    first: Run, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train_run(recipe(str(first.weights), tmp_path / "no", **changes))


def test_an_adapter_that_changes_the_head_is_refused(base: str, tmp_path: Path) -> None:
    run = train_run(
        recipe(base, tmp_path / "head", train={"lora": {"targets": ["lm_head", "q_proj"]}})
    )
    with pytest.raises(RecipeError, match="leaves the head alone"):
        train_run(recipe(str(run.weights), tmp_path / "no"))


# ---------------------------------------------------------------- 4 bits


def test_training_over_a_base_in_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = small_model(tmp_path / "base", size=128)  # the kernels want blocks of 64
    defenses = {"kl": {"where": "train"}, "treft": {}, "ldifs": {}}
    run = train_run(
        recipe(
            base,
            tmp_path / "four",
            train={"precision": "nf4", "epochs": 2},
            defenses=defenses,
            evaluate=SMALL,
        )
    )
    lines = metrics_of(run)
    assert lines[-1]["ce"] < lines[0]["ce"]
    for name in defenses:
        assert abs(lines[0][name]) < 1e-6
        assert lines[-1][name] > 1e-5
    loaded = load_model(str(run.weights), "nf4")
    kinds = {type(module).__name__ for module in loaded.modules()}
    assert "Linear4bit" in kinds
    evaluate_run(run)
    assert run.summary().sets["in_domain"].shift.n > 1


def test_gradients_over_four_bits_are_those_over_the_same_weights_in_full(tmp_path: Path) -> None:
    """Also after a forward in evaluation mode, after which bitsandbytes' kernels for CPUs lose the
    gradient."""
    functional = pytest.importorskip("bitsandbytes").functional
    model = load_model(small_model(tmp_path / "base", size=128), "nf4")
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        model(ids)
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if type(module).__name__ == "Linear4bit":
            weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            linear = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=torch.bfloat16)
            linear.weight.data = weight.to(torch.bfloat16)
            setattr(dense.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], linear)
    found = []
    for base in (model, dense):
        adapted = with_lora(base, target_modules=["q_proj", "down_proj"])
        loss = adapted(ids).logits.float().log_softmax(-1)[0, :, 7].mean()
        found.append({name: g.float() for name, g in gradients(loss, adapted).items()})
    assert all(gradient.abs().max() > 0 for gradient in found[1].values())
    assert_same(*found, tolerance=0.05)


def test_four_bits_and_full_fine_tuning_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match=r"nf4 needs train\.method: lora"):
        parse_recipe({"train": {"method": "full", "precision": "nf4"}})


def test_four_bits_without_bitsandbytes(base: str, monkeypatch: Any) -> None:
    from ringfence.errors import ModelError
    from ringfence.model import loading

    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"nf4 needs bitsandbytes: pip install 'ringfence\[qlora\]'"
    ):
        load_model(base, "nf4")
