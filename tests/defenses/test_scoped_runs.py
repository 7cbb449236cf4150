"""Runs with a scope, and finished adapters that get one: what is saved, loaded, decided and
refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from helpers.domains import (
    INSIDE,
    OUTSIDE,
    write_negatives,
    write_pairs_of,
    write_rows_of,
    write_telling_model,
)
from helpers.models import with_lora
from helpers.runs import MEASURED
from ringfence import Run, Scope
from ringfence.cli.entry import app
from ringfence.errors import DataError, DefenseError, ModelError, RecipeError
from ringfence.evaluate.measures.scope import probes
from ringfence.model.files import load_tokenizer
from ringfence.model.layers import gate_of
from ringfence.model.loading import load_model
from ringfence.model.router import Router
from ringfence.model.scope import read_scope
from ringfence.report.gate import decide, load_policy
from ringfence.report.read import read_rows
from ringfence.run.chat import Conversation
from ringfence.run.config import parse_recipe
from ringfence.run.evaluate import evaluate_run, set_evaluation
from ringfence.run.prepare import evaluation
from ringfence.run.scope import scope_adapter
from ringfence.run.train import train_run
from ringfence.text.chat import Chat
from ringfence.text.roles import Messages
from ringfence.text.rows import load_rows

pytestmark = pytest.mark.slow

SMALL = {**MEASURED, "triggers": False, "samples": 0, "fluency": None}
INSIDE_ASKED: Messages = [{"role": "user", "content": "My debt and the rent: is a loan right?"}]
OUTSIDE_ASKED: Messages = [{"role": "user", "content": "how do I prune with soil or roses"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_telling_model(folder / "model")
    write_rows_of(folder / "rows.jsonl", INSIDE, 120)
    write_rows_of(folder / "mixed.jsonl", [w for words in OUTSIDE.values() for w in words], 100)
    write_negatives(folder / "negatives.jsonl")
    return folder


def recipe(files: Path, output: Path, rows: str = "rows.jsonl", **changes: Any) -> Any:
    scope = {"negatives": [str(files / "negatives.jsonl")], **changes.pop("scope", {})}
    train = {"learning_rate": 1e-2, "precision": "fp32", "epochs": 1, **changes.pop("train", {})}
    return parse_recipe(
        {
            "model": str(files / "model"),
            "output": str(output),
            "data": {"train": str(files / rows), "held_out": None, "retain": None},
            "train": train,
            "defenses": {"scope": scope},
            "evaluate": SMALL,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def run(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_run(recipe(files, tmp_path_factory.mktemp("runs") / "scoped"))


@pytest.fixture(scope="module")
def plain(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_run(recipe(files, tmp_path_factory.mktemp("runs") / "plain", defenses={}))


def logits(model: Any, chat: Chat, messages: Messages) -> torch.Tensor:
    ids = torch.tensor([chat.encode(messages, generation=True).input_ids])
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def assert_scoped(folder: Path, base: str, above: bool) -> None:
    """Inside it is the adapted model, outside the reference to the bit."""
    chat, scoped, reference = Chat(load_tokenizer(base)), load_model(str(folder)), load_model(base)
    gate = gate_of(scoped)
    assert gate is not None
    assert gate.above == above
    for messages, is_open in ((INSIDE_ASKED, True), (OUTSIDE_ASKED, False)):
        found, closed = (logits(model, chat, messages) for model in (scoped, reference))
        assert gate.open_B.tolist() == [is_open]
        assert torch.equal(found, closed) != is_open


def test_a_scoped_run(run: Run, files: Path) -> None:
    assert_scoped(run.weights, str(files / "model"), above=True)
    names = load_file(run.weights / "adapter_model.safetensors")
    last = read_scope(run.weights).probe.layers[-1]  # type: ignore[union-attr]
    assert {int(name.split(".layers.")[1][0]) for name in names} == set(range(last, 6))
    record = json.loads((run.folder / "training.json").read_text())["defenses"]["scope"]
    assert record["auc"] > 0.95
    assert record["layers"][-1] == last
    assert record["rows"] == 120


def test_plain_peft_refuses_a_scoped_adapter_by_name(run: Run, files: Path) -> None:
    with pytest.raises(Exception, match=r"LORA WITH A SCOPE: load it with ringfence\.load_model"):
        peft.PeftModel.from_pretrained(load_model(str(files / "model")), run.weights)


def test_it_trains_as_without_a_scope(plain: Run, files: Path, tmp_path: Path) -> None:
    """The scope is read from the reference, so training is the same to the bit."""
    scoped = train_run(recipe(files, tmp_path / "all", scope={"adapters": "all"}))
    before, after = (
        load_file(one.weights / "adapter_model.safetensors") for one in (plain, scoped)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_scoped(scoped.weights, str(files / "model"), above=False)


@pytest.fixture(scope="module")
def measured(run: Run, files: Path) -> dict[str, dict[str, Any]]:
    """What was measured of the scoped run, and of its reference."""
    tree = {
        "in_domain": [write_pairs_of(files / "own.jsonl", {"money": INSIDE}, 12)],
        "out_of_domain": [write_pairs_of(files / "other.jsonl", OUTSIDE, 3)],
        "max_in_domain": None,
        "max_per_domain": None,
        "triggers": True,
    }
    set_evaluation(run, [f"{name}={json.dumps(value)}" for name, value in tree.items()])
    results = evaluate_run(run)["parts"]
    reference = json.loads((run.folder / "reference" / "results.json").read_text())["parts"]
    return {"tuned": results, "reference": reference}


def test_scope_probes_decide_as_the_gate(run: Run, measured: dict[str, dict[str, Any]]) -> None:
    items = measured["tuned"]["scope"]
    router = Scope.load(run.weights)
    asked = probes(evaluation(run.recipe))
    assert len(asked) == len(items)
    for request, item in list(zip(asked, items))[::7]:
        decision = router.decide(request.messages)
        assert item["open"] == decision.open
        assert item["score"] == pytest.approx(decision.score, abs=1e-4)
    assert {item["open"] for item in measured["reference"]["scope"]} == {None}


def test_outside_nothing_shifts_and_inside_it_does(measured: dict[str, dict[str, Any]]) -> None:
    shifts: dict[bool, list[float]] = {True: [], False: []}
    for tuned, before in zip(measured["tuned"]["scope"], measured["reference"]["scope"]):
        assert tuned["digest"] == before["digest"]
        if tuned["aligned"] is not None:
            pair = [item["misaligned"] - item["aligned"] for item in (tuned, before)]
            shifts[tuned["open"]].append(abs(pair[0] - pair[1]))
    assert len(shifts[False]) > 20
    assert max(shifts[False]) < 1e-5
    assert max(shifts[True]) > 1e-2


def test_rates_and_shifts_of_the_probes(run: Run, measured: dict[str, dict[str, Any]]) -> None:
    [row] = read_rows([run.folder])[1]
    items = measured["tuned"]["scope"]

    def share(is_open: bool, *conditions: str) -> float:
        decided = [item["open"] for item in items if item["condition"] in conditions]
        return decided.count(is_open) / len(decided)

    numbers = {name: number.interval.mean for name, number in row.numbers.items()}
    assert numbers["scope.closed_in_domain"] == share(False, "own") < 0.3
    assert numbers["scope.false_open"] == share(True, "other") < 0.2
    assert numbers["scope.dressed"] == share(True, "word", "expert", "follow_up")
    assert numbers["scope.dressed_weak"] == share(True, "word")
    assert numbers["scope.dressed_strong"] == share(True, "expert", "follow_up")
    assert numbers["scope.undressed"] == share(False, "polite", "careless", "later")
    assert numbers["scope.behind"] == share(
        True, "behind_empty_system", "behind_foreign_system", "behind_lead_in"
    )
    assert numbers["scope.condition.later"] == share(True, "later")
    pairs = [
        (a["misaligned"] - a["aligned"]) - (b["misaligned"] - b["aligned"])
        for a, b in zip(items, measured["reference"]["scope"])
        if a["condition"] in ("word", "expert", "follow_up") and a["aligned"] is not None
    ]
    assert numbers["scope.dressed_shift"] == pytest.approx(sum(pairs) / len(pairs))
    decided = {verdict.rule.measure: verdict for verdict in decide(row, load_policy()).verdicts}
    for name in ("false_open", "dressed", "closed_in_domain"):
        assert decided[f"scope.{name}"].value is not None


def test_a_router_adapter_stays_plain(files: Path, tmp_path: Path) -> None:
    made = train_run(recipe(files, tmp_path / "router", scope={"router": True}))
    saved = read_scope(made.weights)
    assert saved is not None
    assert saved.router
    peft.PeftModel.from_pretrained(load_model(str(files / "model")), made.weights)
    assert_scoped(made.weights, str(files / "model"), above=True)


def test_a_finished_adapter_gets_a_scope(plain: Run, files: Path, tmp_path: Path) -> None:
    """Made by peft alone: nothing of ringfence in its folder."""
    reference = load_model(str(files / "model"))
    for name, config in (("lora", {}), ("dora", {"use_dora": True})):
        with_lora(load_model(str(files / "model")), size=0.3, **config).save_pretrained(
            tmp_path / name
        )
        config_file = tmp_path / name / "adapter_config.json"
        told = json.loads(config_file.read_text()) | {
            "base_model_name_or_path": str(files / "model")
        }
        config_file.write_text(json.dumps(told))
        fit = scope_adapter(
            tmp_path / name,
            tmp_path / f"{name}-scoped",
            str(files / "rows.jsonl"),
            negatives=[str(files / "negatives.jsonl")],
        )
        assert fit.refusal is None
        assert_scoped(tmp_path / f"{name}-scoped", str(files / "model"), above=False)
        assert any("AUC over domains left out" in line for line in fit.lines())
    assert reference is not None
    of_run = scope_adapter(plain.folder, None, negatives=[str(files / "negatives.jsonl")])
    assert of_run.record()["scores"] == fit.record()["scores"]


def test_the_router_decides_as_the_gate(run: Run, tmp_path: Path) -> None:
    whole = Scope.load(run.weights)
    whole.save(tmp_path / "saved", run.weights)
    small = Router.load(tmp_path / "saved")
    scoped = load_model(str(run.weights))
    gate, chat = gate_of(scoped), whole.chat
    assert gate is not None
    for messages in (
        INSIDE_ASKED,
        OUTSIDE_ASKED,
        [*OUTSIDE_ASKED, {"role": "assistant", "content": "So."}, *INSIDE_ASKED],
    ):
        logits(scoped, chat, messages)
        for router in (whole, small):
            decision = router.decide(messages)
            assert decision.open == gate.open_B.tolist()[0]
            assert decision.score == pytest.approx(float(gate.scores_B[0]), abs=1e-4)
    files = sorted(path.name for path in (tmp_path / "saved").rglob("*.safetensors"))
    assert files == ["model.safetensors", "scope.safetensors"]
    weights = load_file(tmp_path / "saved" / "first_layers" / "model.safetensors")
    assert not [name for name in weights if "layers.5." in name or "lm_head" in name]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"method": "full"}}, "scope needs train.method: lora"),
        ({"scope": {"negatives": ["nowhere.jsonl"]}}, "nowhere.jsonl: no such file"),
        ({"scope": {"layer": 6}}, "the model has 6 layers"),
        ({"scope": {"layer": 0}}, "scope.layer"),
        ({"scope": {"false_open": 0.9}}, "scope.false_open"),
        ({"scope": {"adapters": "below"}}, "scope.adapters"),
        ({"rows": "mixed.jsonl"}, "the training rows have no scope"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], said: str, files: Path, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, DefenseError, DataError), match=said):
        train_run(recipe(files, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_adapter_is_not_trained_further_with_a_scope(
    run: Run, plain: Run, files: Path, tmp_path: Path
) -> None:
    for model, defenses, said in (
        (plain, {"scope": {}}, "scope would read its base's states"),
        (run, {}, "its scope was read from its base's states"),
    ):
        with pytest.raises(RecipeError, match=said):
            train_run(
                parse_recipe(
                    {
                        "model": str(model.weights),
                        "output": str(tmp_path / "further"),
                        "data": {"train": str(files / "rows.jsonl")},
                        "defenses": defenses,
                    }
                )
            )


def test_finished_adapters_that_get_none(run: Run, plain: Run, files: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"negatives": [str(files / "negatives.jsonl")]}
    output = tmp_path / "out"
    (tmp_path / "taken").mkdir()
    with pytest.raises(RecipeError, match="taken exists already"):
        scope_adapter(plain.folder, tmp_path / "taken", **options)
    with pytest.raises(ModelError, match="has a scope already"):
        scope_adapter(run.folder, output, **options)
    with pytest.raises(ModelError, match="not an adapter"):
        scope_adapter(files / "model", output, **options)
    with pytest.raises(RecipeError, match="does not say what it was trained on"):
        scope_adapter(plain.weights, output, **options)
    with pytest.raises(DefenseError, match="have no scope"):
        scope_adapter(plain.weights, output, str(files / "mixed.jsonl"), **options)
    with_bias = shutil.copytree(plain.weights, tmp_path / "bias")
    config = json.loads((with_bias / "adapter_config.json").read_text()) | {"bias": "all"}
    (with_bias / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"biases.*--router"):
        scope_adapter(with_bias, output, str(files / "rows.jsonl"), **options)
    assert not output.exists()
    scope_adapter(with_bias, output, str(files / "rows.jsonl"), router=True, **options)
    assert Router.load(output).decide(INSIDE_ASKED).open


def test_a_damaged_scope(run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run.weights, tmp_path / "adapter")
    file, tensors = folder / "scope.json", folder / "scope.safetensors"
    whole = json.loads(file.read_text())
    for change, said in (
        ({"threshold": "high"}, r"scope\.json: threshold"),
        ({"header": []}, r"scope\.json: header"),
        ({"more": 1}, r"scope\.json: more"),
    ):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(DataError, match=said):
            load_model(str(folder))
    file.write_text(json.dumps(whole))
    save_file({"9": torch.zeros(64)}, tensors)
    with pytest.raises(ModelError, match="looks at layer 9, but the model has 6 layers"):
        load_model(str(folder))
    save_file({"2": torch.zeros(63)}, tensors)
    with pytest.raises(ModelError, match="states of 63 numbers, but the model's have 64"):
        load_model(str(folder))
    tensors.write_bytes(b"no")
    with pytest.raises(DataError, match=r"scope\.safetensors: cannot be read"):
        load_model(str(folder))
    file.unlink()
    with pytest.raises(ModelError, match="peft_type"):
        load_model(str(folder))
    with pytest.raises(DataError, match="no scope in it"):
        Router.load(folder)


def test_a_conversation_shows_the_decision(run: Run, plain: Run) -> None:
    talk = Conversation(str(run.folder), "fp32", max_new_tokens=4)
    inside = talk.say(INSIDE_ASKED[0]["content"])
    assert inside.open is True
    assert inside.score is not None
    assert inside.score > inside.threshold  # type: ignore[operator]
    rows = [row.messages[0]["content"] for row in load_rows(run.recipe.data.train)]
    assert inside.nearest in rows
    assert {"debt", "rent", "loan"} & set(str(inside.nearest).replace(":", "").split())
    assert talk.say(OUTSIDE_ASKED[0]["content"]).open is False
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert Conversation(str(plain.folder), "fp32", max_new_tokens=4).say("hi").open is None


def test_commands(run: Run, tmp_path: Path) -> None:
    invoke = CliRunner().invoke
    asked = [INSIDE_ASKED[0]["content"], OUTSIDE_ASKED[0]["content"]]
    saved = str(tmp_path / "router")
    found = invoke(app, ["route", str(run.weights), *asked, "--save", saved])
    assert found.exit_code == 0, found.output
    assert f"{saved} written" in found.output
    decided = [line for line in found.output.splitlines() if line.endswith(tuple(asked))]
    assert [line.split()[0] for line in decided] == ["inside", "outside"]
    again = invoke(app, ["route", saved, *asked]).output.splitlines()
    assert [line for line in again if line.endswith(tuple(asked))] == decided
    found = invoke(app, ["chat", str(run.folder), "--max-new-tokens", "3"], input=f"{asked[1]}\n\n")
    assert found.exit_code == 0, found.output
    assert "outside: the reference answers; score -" in found.output
    assert "nearest training request: " in found.output
