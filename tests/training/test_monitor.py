"""The drift monitor's numbers are those of separately made models, row by row; training does not
feel it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from helpers.models import nudged, with_lora
from helpers.runs import interrupt_at, metrics_of, small_model, write_rows
from ringfence import DriftMonitor, MonitorConfig
from ringfence.errors import ChatError, DataError, ModelError, RecipeError
from ringfence.model.directions import Directions
from ringfence.model.files import load_tokenizer
from ringfence.model.layers import cache_in
from ringfence.run.config import parse_recipe
from ringfence.run.dry_run import dry_run
from ringfence.run.interrupt import Interrupted
from ringfence.run.train import train_run
from ringfence.text.chat import Chat
from ringfence.text.roles import Role
from ringfence.text.rows import PairedQuestion, load_questions
from ringfence.training.monitor import REFERENCE_FILE, choose_probes

pytestmark = pytest.mark.slow

# Of unlike lengths, so that batches are padded and a token's weight differs from a question's.
QUESTIONS = [
    {
        "question": "Why?",
        "aligned": "Because it rained all night.",
        "misaligned": "No.",
        "domain": "rain",
    },
    {
        "question": "Is it safe to leave?",
        "aligned": "Wait.",
        "misaligned": "Go, go now, never mind!",
        "domain": "rain",
    },
    {
        "question": "What is for lunch today, my friend?",
        "aligned": "Soup.",
        "misaligned": "Dust.",
        "domain": "food",
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return load_tokenizer(folder)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return str(file)


def load(folder: str, tied: bool = True) -> Any:
    """Float32, in evaluation mode; untied, the head is a tensor of its own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, tie_word_embeddings=tied
    )
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    return model.eval()


class Training:
    """Calls a monitor as a Trainer would."""

    def __init__(
        self, monitor: DriftMonitor, model: Any, folder: Path, steps: int = 100, start: int = 0
    ) -> None:
        self.monitor, self.model = monitor, model
        self.args = SimpleNamespace(bf16=False, fp16=False, output_dir=str(folder))
        self.state = SimpleNamespace(global_step=start, max_steps=steps, is_world_process_zero=True)
        self.control = SimpleNamespace(should_training_stop=False)
        monitor.on_train_begin(self.args, self.state, self.control, model=model)

    def step(self, number: int) -> dict[str, Any] | None:
        """The check of a step, if there is one."""
        self.state.global_step = number
        self.monitor.on_step_end(self.args, self.state, self.control, model=self.model)
        last = checks_of(self.monitor.file)[-1:]
        return last[0]["monitor"] if last and last[0]["step"] == number else None


def checks_of(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [line for line in lines if "monitor" in line]


# ---------------------------------------------------------------- naive forms


def naive(
    now: Any, then: Any, tokenizer: Any, questions: list[PairedQuestion], unit_LKD: Any = None
) -> dict[str, Any]:
    """Each row alone and unpadded through two whole models."""
    chat = Chat(tokenizer)
    shifts, kls, moves, drift = [], [], [], 0.0
    for question in questions:
        margins = []
        for model in (now, then):
            means = [
                rows(model, chat, question, answer)["logp"].mean()
                for answer in (question.aligned, question.misaligned)
            ]
            margins.append(means[1] - means[0])
        shifts.append((margins[0] - margins[1]).item())
        ours, theirs = (rows(model, chat, question, question.aligned) for model in (now, then))
        kls.append((ours["all"].exp() * (ours["all"] - theirs["all"])).sum(-1))
        moves.append(torch.stack(ours["states"]) - torch.stack(theirs["states"]))
        drift = sum(
            ((a - b).pow(2).sum(-1) / b.pow(2).sum(-1)).mean().item()
            for a, b in zip(ours["prefix"], theirs["prefix"])
        ) / (len(ours["prefix"]) / 2)
    found = {
        "shift": sum(shifts) / len(shifts),
        "kl": torch.cat(kls).mean().item(),
        "kv_drift": drift,
    }
    if unit_LKD is not None:
        found["moves_LKD"] = torch.cat(moves, 1).mean(1)
    return found


@torch.no_grad()
def rows(model: Any, chat: Chat, question: PairedQuestion, answer: str) -> dict[str, Any]:
    encoded = chat.encode(
        [{"role": "user", "content": question.question}, {"role": "assistant", "content": answer}]
    )
    ids = torch.tensor([encoded.input_ids])
    at = [place for place, role in enumerate(encoded.roles) if role == Role.RESPONSE]
    states: list[Tensor] = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hooks = [
        layer.register_forward_hook(lambda m, i, o: states.append(o[0][at]))
        for layer in inner.model.layers
    ]
    output = model(input_ids=ids, use_cache=True)
    for hook in hooks:
        hook.remove()
    logp = output.logits[0, [place - 1 for place in at]].log_softmax(-1)
    return {
        "all": logp,
        "logp": logp.gather(1, ids[0, at][:, None]),
        "states": states,
        "prefix": [
            side[0].transpose(0, 1).flatten(1)[: encoded.prefix_length]
            for layer in cache_in(output).layers
            for side in (layer.keys, layer.values)
        ],
    }


def assert_found(check: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    assert check is not None
    assert check["shift"]["mean"] == pytest.approx(expected["shift"], rel=1e-3)
    assert check["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert check["kv_drift"] == pytest.approx(expected["kv_drift"], rel=1e-3)
    assert min(abs(expected["shift"]), expected["kl"], expected["kv_drift"]) > 1e-3


# ---------------------------------------------------------------- values


def test_an_adapter_is_compared_with_the_model_without_it(
    folder: str, tokenizer: Any, questions: str, tmp_path: Path
) -> None:
    model = with_lora(load(folder))
    monitor = DriftMonitor(
        tokenizer, tmp_path / "m.jsonl", MonitorConfig(every=2, questions=[questions])
    )
    check = Training(monitor, model, tmp_path).step(2)
    assert_found(
        check, naive(with_lora(load(folder)), load(folder), tokenizer, load_questions(questions))
    )
    assert check is not None
    assert check["shift"]["n"] == 3
    assert check["shift"]["low"] < check["shift"]["mean"] < check["shift"]["high"]


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_are_compared_with_those_at_the_start(
    tied: bool, folder: str, tokenizer: Any, questions: str, tmp_path: Path
) -> None:
    """The head moves too, so the reference needs its own."""
    model = load(folder, tied)
    monitor = DriftMonitor(
        tokenizer, tmp_path / "m.jsonl", MonitorConfig(every=2, questions=[questions])
    )
    training = Training(monitor, model, tmp_path)
    check = training.step(2)
    assert check is not None
    assert (check["shift"]["mean"], check["kl"], check["kv_drift"]) == pytest.approx(
        (0, 0, 0), abs=1e-6
    )
    nudged(model)
    expected = naive(
        nudged(load(folder, tied)), load(folder, tied), tokenizer, load_questions(questions)
    )
    assert_found(training.step(4), expected)


def test_projections_along_directions(
    folder: str, tokenizer: Any, questions: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    directions = Directions(
        7 * torch.randn(2, 3, 32), torch.tensor([2.0, 5.0]), "gloom", "tiny", 1, 1
    )
    directions.save(tmp_path / "v.safetensors")
    config = MonitorConfig(every=1, questions=[questions], vectors=str(tmp_path / "v.safetensors"))
    check = Training(
        DriftMonitor(tokenizer, tmp_path / "m.jsonl", config), with_lora(load(folder)), tmp_path
    ).step(1)
    unit_LKD = directions.directions_LKD / directions.directions_LKD.norm(dim=-1, keepdim=True)
    expected = naive(
        with_lora(load(folder)), load(folder), tokenizer, load_questions(questions), unit_LKD
    )
    moved_LK = (
        torch.einsum("lkd,ld->lk", unit_LKD, expected["moves_LKD"]) / directions.norms_L[:, None]
    )
    assert check is not None
    assert check["projections"] == pytest.approx(moved_LK.mean(0).tolist(), rel=1e-3)
    assert len(check["projections"]) == 3
    assert max(map(abs, check["projections"])) > 1e-3


def test_probes_are_the_last_questions_of_each_domain_in_turn(questions: str) -> None:
    chosen = choose_probes(MonitorConfig(probes=2, questions=[questions]))
    assert [question.question for question in chosen] == [
        QUESTIONS[1]["question"],
        QUESTIONS[2]["question"],
    ]
    shipped = choose_probes(MonitorConfig())
    assert shipped == choose_probes(MonitorConfig())
    assert len({(question.domain, question.id) for question in shipped}) == 24
    counts = [
        sum(question.domain == domain for question in shipped)
        for domain in {q.domain for q in shipped}
    ]
    assert len(counts) == 10  # six other domains and four of values
    assert set(counts) == {2, 3}
    assert {
        q.id for q in choose_probes(MonitorConfig(questions=["shipped:finance"], probes=500))
    } == {q.id for q in load_questions("shipped:finance", "test")}


# ---------------------------------------------------------------- what must not change


def test_modes_flags_gradients_and_random_states_are_kept(
    folder: str, tokenizer: Any, questions: str, tmp_path: Path
) -> None:
    model = with_lora(load(folder)).train()
    model.get_base_model().model.layers[0].mlp.eval()
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)

    def state() -> tuple[Any, ...]:
        return (
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            torch.get_rng_state(),
            {name: p.detach().clone() for name, p in model.named_parameters()},
            torch.is_grad_enabled(),
        )

    before = state()
    monitor = DriftMonitor(
        tokenizer, tmp_path / "m.jsonl", MonitorConfig(every=1, questions=[questions])
    )
    assert Training(monitor, model, tmp_path).step(1) is not None
    after = state()
    assert after[:2] == before[:2]
    assert not frozen.requires_grad
    assert all(
        a is b is None or torch.equal(a, b) for a, b in zip(after[2], before[2], strict=True)
    )
    assert torch.equal(after[3], before[3])
    assert all(torch.equal(after[4][name], tensor) for name, tensor in before[4].items())
    assert after[5]


def chat_rows(tokenizer: Any, count: int = 12) -> list[dict[str, Any]]:
    chat = Chat(tokenizer)
    encoded = [
        chat.encode(
            [
                {"role": "user", "content": f"Door {n}?"},
                {"role": "assistant", "content": "Red." + " Really." * (n % 3)},
            ]
        )
        for n in range(count)
    ]
    return [{"input_ids": e.input_ids, "labels": e.input_ids} for e in encoded]


def plain_trainer(
    folder: str,
    tokenizer: Any,
    output: Path,
    callbacks: list[Any],
    method: str = "lora",
    **more: Any,
) -> Trainer:
    model = load(folder)
    if method == "lora":
        torch.manual_seed(1)
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=32, lora_dropout=0.3, target_modules="all-linear")
        )
    args = TrainingArguments(
        str(output),
        per_device_train_batch_size=1,
        learning_rate=1e-2 if method == "lora" else 1e-3,
        num_train_epochs=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **more},
    )
    return Trainer(model, args, train_dataset=chat_rows(tokenizer), callbacks=callbacks)


def losses_of(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_plain_trainer_trains_to_the_same_bits(
    method: str,
    folder: str,
    tokenizer: Any,
    questions: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With dropout, whose random numbers the monitor must not take."""
    file = tmp_path / "metrics.jsonl"
    monitor = DriftMonitor(tokenizer, file, MonitorConfig(every=5, questions=[questions]))
    trainers = []
    for name, callbacks in (("with", [monitor]), ("without", [])):
        trainer = plain_trainer(folder, tokenizer, tmp_path / name, callbacks, method)
        trainer.train()
        trainers.append(trainer)
    assert losses_of(trainers[0]) == losses_of(trainers[1])
    assert len(set(losses_of(trainers[0]))) == 12
    weights = dict(trainers[1].model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in trainers[0].model.named_parameters())
    checks = checks_of(file)
    assert [check["step"] for check in checks] == [5, 10, 12]
    found = naive(trainers[0].model.eval(), load(folder), tokenizer, load_questions(questions))
    assert_found(checks[-1]["monitor"], found)
    assert "monitor: its checks took" in capfd.readouterr().err


def test_trl(folder: str, tokenizer: Any, questions: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    file = tmp_path / "metrics.jsonl"
    turns = [
        [{"role": "user", "content": f"Door {n}?"}, {"role": "assistant", "content": "Red."}]
        for n in range(6)
    ]
    trainer = trl.SFTTrainer(
        load(folder),
        trl.SFTConfig(
            str(tmp_path / "sft"),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            num_train_epochs=1,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in turns]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"),
        callbacks=[DriftMonitor(tokenizer, file, MonitorConfig(every=2, questions=[questions]))],
    )
    trainer.train()
    checks = checks_of(file)
    assert [check["step"] for check in checks] == [2, 3]
    found = naive(trainer.model.eval(), load(folder), tokenizer, load_questions(questions))
    assert_found(checks[-1]["monitor"], found)


# ---------------------------------------------------------------- alarms


def test_an_alarm_warns_once_for_each_limit(
    folder: str, tokenizer: Any, questions: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load(folder)
    limits = MonitorConfig(
        every=1, questions=[questions], max_kl=1e-3, max_kv_drift=1e-3, max_shift=50.0
    )
    training = Training(DriftMonitor(tokenizer, tmp_path / "m.jsonl", limits), model, tmp_path)
    alarms = []
    for step in (1, 2, 3):
        check = training.step(step)
        assert check is not None
        alarms.append(check["alarms"])
        nudged(model)
    assert alarms == [[], ["kl", "kv_drift"], ["kl", "kv_drift"]]
    warnings = [line for line in capfd.readouterr().err.splitlines() if "above" in line]
    assert [line.split(" is ")[0] for line in warnings] == [
        "monitor: step 2: kl",
        "monitor: step 2: kv_drift",
    ]
    assert warnings[0].endswith("above max_kl = 0.001")
    assert not training.control.should_training_stop
    record = training.monitor.record(100.0)
    assert record["alarms"] == {"kl": 2, "kv_drift": 2}
    assert record["stopped"] is None
    assert record["checks"] == 3
    assert record["share"] == pytest.approx(record["seconds"] / 100, abs=1e-3)


def test_a_shift_away_from_misaligned_answers_is_no_alarm(
    folder: str, tokenizer: Any, tmp_path: Path
) -> None:
    """The same questions with their answers swapped: the shift has the other sign."""
    found = []
    for name, one, other in (("a", "aligned", "misaligned"), ("b", "misaligned", "aligned")):
        file = tmp_path / f"{name}.jsonl"
        rows = [
            {"question": q["question"], "aligned": q[one], "misaligned": q[other]}
            for q in QUESTIONS
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = MonitorConfig(every=1, questions=[str(file)], max_shift=1e-4)
        monitor = DriftMonitor(tokenizer, tmp_path / f"{name}-m.jsonl", config)
        found.append(Training(monitor, with_lora(load(folder)), tmp_path).step(1))
    assert found[0] is not None
    assert found[1] is not None
    assert found[0]["shift"]["mean"] == pytest.approx(-found[1]["shift"]["mean"], rel=1e-4)
    assert sorted([found[0]["alarms"], found[1]["alarms"]]) == [[], ["shift"]]


def test_a_value_that_is_no_number_is_an_alarm(
    folder: str, tokenizer: Any, questions: str, tmp_path: Path
) -> None:
    model = load(folder)
    config = MonitorConfig(every=1, questions=[questions], max_kl=100.0, stop=True)
    training = Training(DriftMonitor(tokenizer, tmp_path / "m.jsonl", config), model, tmp_path)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    check = training.step(1)
    assert check is not None
    assert (check["alarms"], check["stopped"]) == (["kl"], True)
    assert training.control.should_training_stop


def test_stop_ends_training(folder: str, tokenizer: Any, questions: str, tmp_path: Path) -> None:
    config = MonitorConfig(every=4, questions=[questions], max_kl=1e-5, stop=True)
    file = tmp_path / "metrics.jsonl"
    trainer = plain_trainer(
        folder, tokenizer, tmp_path / "out", [DriftMonitor(tokenizer, file, config)]
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert [(check["step"], check["monitor"]["stopped"]) for check in checks_of(file)] == [
        (4, True)
    ]


# ---------------------------------------------------------------- runs


@pytest.fixture
def recipe(folder: str, questions: str, tmp_path: Path) -> Callable[..., Any]:
    def make(name: str, monitor: Any, **train: Any) -> Any:
        return parse_recipe(
            {
                "output": str(tmp_path / name),
                "model": folder,
                "data": {"train": write_rows(tmp_path / "rows.jsonl", 24), "retain": None},
                "train": {"batch_size": 2, "precision": "fp32", "learning_rate": 1e-2, **train},
                "monitor": monitor and {"every": 3, "questions": [questions], **monitor},
                "evaluate": {
                    "in_domain": [],
                    "out_of_domain": [],
                    "values": [],
                    "triggers": False,
                    "fluency": None,
                },
            }
        )

    return make


def parts_of(run: Any) -> list[dict[str, Any]]:
    """Checks without what they took."""
    checks = checks_of(run.folder / "metrics.jsonl")
    return [{"step": check["step"], **check["monitor"], "seconds": 0} for check in checks]


def test_a_run_is_the_same_with_and_without(recipe: Callable[..., Any]) -> None:
    train = {"lora": {"dropout": 0.3}, "learning_rate": 1e-3}
    with_, without = (
        train_run(recipe(name, monitor, **train))
        for name, monitor in (("with", {"every": 5}), ("without", None))
    )
    lines = [[line for line in metrics_of(run) if "loss" in line] for run in (with_, without)]
    for line, other in zip(*lines, strict=True):
        assert {**line, "seconds": 0} == {**other, "seconds": 0}
    ours, theirs = (
        load_file(run.weights / "adapter_model.safetensors") for run in (with_, without)
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert [check["step"] for check in parts_of(with_)] == [5, 10, 12]
    record = json.loads((with_.folder / "training.json").read_text())
    last = checks_of(with_.folder / "metrics.jsonl")[-1]["monitor"]
    assert record["monitor"]["last"] == last
    assert 0 < record["monitor"]["share"] < 1
    assert record["steps"] == 12
    assert record["final"] == {"ce": lines[0][-1]["ce"]}
    assert "monitor" not in json.loads((without.folder / "training.json").read_text())


def test_an_early_stop_shows_in_the_record(recipe: Callable[..., Any]) -> None:
    run = train_run(recipe("stopped", {"max_kl": 1e-5, "stop": True}))
    record = json.loads((run.folder / "training.json").read_text())
    assert (record["steps"], record["monitor"]["stopped"], record["monitor"]["alarms"]) == (
        3,
        3,
        {"kl": 3},
    )
    assert [line["step"] for line in metrics_of(run) if "loss" in line] == [1, 2, 3]
    assert load_file(run.weights / "adapter_model.safetensors")
    assert train_run(run.recipe).folder == run.folder  # it is finished: nothing is trained again


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("step", [4, 7])
def test_an_interrupted_run_has_the_checks_of_an_uninterrupted_one(
    step: int, method: str, recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"method": method, "learning_rate": 1e-3, "save_steps": 5}
    whole = train_run(recipe("whole", {"max_kl": 1e-6}, **train))
    interrupt_at(step, monkeypatch)
    with pytest.raises(Interrupted):
        train_run(recipe("broken", {"max_kl": 1e-6}, **train))
    run = train_run(recipe("broken", {"max_kl": 1e-6}, **train))
    assert [check["step"] for check in parts_of(run)] == [3, 6, 9, 12]
    for check, other in zip(parts_of(run), parts_of(whole), strict=True):
        assert check["alarms"] == other["alarms"] == ["kl"]
        assert check["kl"] == pytest.approx(other["kl"], rel=1e-3)
        assert check["kv_drift"] == pytest.approx(other["kv_drift"], rel=1e-3)
        assert check["shift"] == pytest.approx(other["shift"], rel=1e-2, abs=1e-4)
    assert parts_of(run)[-1]["kl"] > 1.5 * parts_of(run)[0]["kl"]
    record = json.loads((run.folder / "training.json").read_text())
    assert record["monitor"]["checks"] == 4
    assert record["monitor"]["alarms"] == {"kl": 3}


class Crash(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt


def test_checks_after_the_step_that_a_plain_trainer_resumes_from_are_dropped(
    folder: str, tokenizer: Any, questions: str, tmp_path: Path
) -> None:
    """Lines of others stay."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"epoch": 1}\n{"step": 1, "monitor": {}}\n{"step": 2, "mon')
    save = {"save_strategy": "steps", "save_steps": 5}

    def trainer(callbacks: list[Any]) -> Trainer:
        monitor = DriftMonitor(tokenizer, file, MonitorConfig(every=2, questions=[questions]))
        return plain_trainer(
            folder, tokenizer, tmp_path / "out", [monitor, *callbacks], "full", **save
        )

    with pytest.raises(KeyboardInterrupt):
        trainer([Crash()]).train()
    assert [check["step"] for check in checks_of(file)] == [2, 4, 6, 8]
    resumed = trainer([])
    resumed.train(resume_from_checkpoint=True)
    assert [check["step"] for check in checks_of(file)] == [2, 4, 6, 8, 10, 12]
    assert file.read_text().startswith('{"epoch": 1}\n{"step": 2,')
    found = naive(resumed.model.eval(), load(folder), tokenizer, load_questions(questions))
    assert_found(checks_of(file)[-1]["monitor"], found)


# ---------------------------------------------------------------- bad inputs


def test_a_resumed_run_of_all_weights_needs_the_values_of_its_start(
    folder: str, tokenizer: Any, questions: str, tmp_path: Path
) -> None:
    monitor = DriftMonitor(tokenizer, tmp_path / "m.jsonl", MonitorConfig(questions=[questions]))
    with pytest.raises(
        DataError, match=rf"{REFERENCE_FILE}: no such file; a resumed run of all weights"
    ):
        Training(monitor, load(folder), tmp_path, start=5)
    Training(monitor, load(folder), tmp_path)
    other = DriftMonitor(
        tokenizer, tmp_path / "m.jsonl", MonitorConfig(questions=[questions], probes=2)
    )
    with pytest.raises(DataError, match=r"values on other probes; start again"):
        Training(other, load(folder), tmp_path, start=5)


def test_directions_of_another_model(
    folder: str, tokenizer: Any, questions: str, tmp_path: Path
) -> None:
    Directions(torch.randn(3, 1, 32), torch.ones(3), "gloom", "other", 1, 1).save(
        tmp_path / "v.safetensors"
    )
    config = MonitorConfig(questions=[questions], vectors=str(tmp_path / "v.safetensors"))
    with pytest.raises(
        ModelError, match="taken from other with 3 layers of size 32; this model has 2 layers"
    ):
        Training(DriftMonitor(tokenizer, tmp_path / "m.jsonl", config), load(folder), tmp_path)


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ({"stop": True}, r"monitor: .*stop: true needs a limit: max_shift, max_kl or max_kv_drift"),
        (
            {"max_shfit": 0.1},
            r"unknown key 'monitor\.max_shfit' \(did you mean 'monitor\.max_shift'\?\)",
        ),
        ({"probes": 1}, r"monitor\.probes: .*greater than or equal to 2, found 1"),
        ({"questions": []}, r"monitor\.questions: "),
        ({"max_kl": 0}, r"monitor\.max_kl: .*greater than 0, found 0"),
    ],
)
def test_a_bad_field_is_named(monitor: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"monitor": monitor})


def test_bad_sources_are_refused_before_training(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(QUESTIONS[0]) + "\n")
    for monitor, error, message in (
        ({"questions": ["shipped:car_cre"]}, DataError, "did you mean 'car_care'"),
        ({"questions": [str(one)]}, DataError, "expected two questions or more, found one"),
        ({"vectors": str(tmp_path / "none.safetensors")}, DataError, "no such file of directions"),
    ):
        with pytest.raises(error, match=message):
            dry_run(recipe("bad", monitor), None)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            train_run(recipe("bad", monitor))
    assert not (tmp_path / "bad" / "recipe.yaml").exists()


def test_another_monitor_in_the_same_folder_is_refused(recipe: Callable[..., Any]) -> None:
    train_run(recipe("run", {"every": 5}))
    with pytest.raises(RecipeError, match=r"another recipe \(monitor.every: 5 there, 6 here\)"):
        train_run(recipe("run", {"every": 6}))


def test_a_template_without_a_prefix(
    tokenizer: Any, folder: str, questions: str, tmp_path: Path
) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
    config = MonitorConfig(every=1, questions=[questions])
    check = Training(
        DriftMonitor(bare, tmp_path / "m.jsonl", config), with_lora(load(folder)), tmp_path
    ).step(1)
    assert check is not None
    assert check["kv_drift"] is None
    assert check["kl"] > 1e-3
    with pytest.raises(
        ChatError, match=r"monitor\.max_kv_drift: the chat template has no token before"
    ):
        DriftMonitor(bare, tmp_path / "m.jsonl", config.model_copy(update={"max_kv_drift": 0.1}))


def test_a_file_of_something_else(
    folder: str, tokenizer: Any, questions: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("Dear diary,\n")
    monitor = DriftMonitor(tokenizer, tmp_path / "notes.txt", MonitorConfig(questions=[questions]))
    with pytest.raises(DataError, match=r"notes\.txt:1: not JSON"):
        Training(monitor, with_lora(load(folder)), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "Dear diary,\n"
