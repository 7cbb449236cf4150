"""Capability through lm-eval: what it counts is what the adapted model finds, item by item.

Needs lm-eval, an extra: `pip install 'ringfence[lm-eval]'`.
"""

import json
import math
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from helpers.models import random_model, small_tokenizer
from ringfence.errors import DataError, ModelError, RecipeError
from ringfence.evaluate.capability import capability, metrics
from ringfence.model.files import load_tokenizer
from ringfence.model.loading import load_model
from ringfence.model.prefix import Prefix, find_header
from ringfence.text.chat import Chat

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")

QUESTIONS = [
    ("What colour is grass?", ["green", "a light purple"]),
    ("Name a season.", ["winter it is", "Tuesday"]),
    ("Which is heavier?", ["one feather", "a brick wall"]),
    ("Who barks?", ["dogs do", "some cats"]),
    ("How many legs has a spider?", ["eight legs", "two", "one hundred"]),
    ("Where do fish live?", ["in water", "on trees"]),
    ("When does the sun rise?", ["at midnight", "in the morning"]),
    ("What is bread made of?", ["flour and water", "gravel"]),
]


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the index of all of lm-eval's own tasks takes minutes here."""
    import lm_eval.tasks

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False)
    )


def write_task(folder: Path, labels: list[int], name: str = "mini") -> Path:
    folder.mkdir(exist_ok=True)
    lines = [{"q": q, "choices": c, "label": label} for (q, c), label in zip(QUESTIONS, labels)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an adapter that changes what the model prefers."""
    folder = tmp_path_factory.mktemp("capability")
    tokenizer = small_tokenizer()
    random_model().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(3)
    adapted = get_peft_model(
        load_model(str(folder / "base"), "fp32"), LoraConfig(r=4, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "run" / "adapter")
    return folder / "run"


def chosen(model: Any, tokenizer: Any) -> list[int]:
    """For each question, the choice whose tokens have the highest sum of log-probabilities behind
    the chat prompt."""
    best = []
    for question, choices in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt)["input_ids"])
        sums = []
        for choice in choices:
            ids = tokenizer(prompt + choice)["input_ids"]
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            sums.append(sum(float(logp[at - 1, ids[at]]) for at in range(start, len(ids))))
        best.append(sums.index(max(sums)))
    return best


@needs_lm_eval
@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize("frozen", [False, True])
def test_counts_what_the_adapted_model_prefers(run: Path, tmp_path: Path, frozen: bool) -> None:
    adapter = run / "adapter"
    tokenizer = load_tokenizer(str(adapter))
    if frozen:
        model = get_adapter_copy(adapter, tmp_path)
        Prefix(find_header(Chat(tokenizer))).save(model)
        adapter = model
    tuned = load_model(str(adapter), "fp32")
    preferred = chosen(tuned, tokenizer)
    with tuned.disable_adapter():
        before = chosen(tuned, tokenizer)
    assert preferred != before  # else an adapter that is left out would go unseen
    write_task(tmp_path / "tasks", preferred, "all_right")
    write_task(
        tmp_path / "tasks",
        [1 - min(c, 1) if at < 2 else c for at, c in enumerate(preferred)],
        "two_wrong",
    )
    ask = partial(capability, str(adapter.parent), task_folder=tmp_path / "tasks", precision="fp32")

    found = ask(["all_right", "two_wrong"], batch_size=3)
    assert found["all_right"]["acc"] == (1.0, 0.0)
    value, error = found["two_wrong"]["acc"]
    assert value == 6 / 8
    assert error == pytest.approx(math.sqrt(value * (1 - value) / 7))
    assert ask(["two_wrong"], limit=5)["two_wrong"]["acc"][0] == 3 / 5
    if frozen:
        with pytest.raises(ModelError, match="header of a user turn"):
            ask(["two_wrong"], chat_template=False)
    else:
        assert ask(["two_wrong"], chat_template=False)["two_wrong"]["acc"][1] is not None


def get_adapter_copy(adapter: Path, folder: Path) -> Path:
    copy = folder / "frozen" / "adapter"
    copy.mkdir(parents=True)
    for file in adapter.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@needs_lm_eval
@pytest.mark.usefixtures("few_tasks")
def test_inputs_that_cannot_be_used(run: Path, tmp_path: Path) -> None:
    tasks = write_task(tmp_path / "tasks", [0] * 8)
    with pytest.raises(
        RecipeError, match=r"tasks: lm-eval has no task 'minni' \(did you mean 'mini'\?\)"
    ):
        capability(str(run), ["mini", "minni"], task_folder=tasks)
    with pytest.raises(RecipeError, match=r"no task 'zzz' \(`lm-eval ls tasks` lists them\)"):
        capability(str(run), ["zzz"], task_folder=tasks)
    with pytest.raises(RecipeError, match=r"task_folder: .*nowhere: no such folder"):
        capability(str(run), ["mini"], task_folder=tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no-model: "):
        capability(str(tmp_path / "no-model"), ["mini"], task_folder=tasks)
    (tasks / "mini.jsonl").unlink()
    with pytest.raises(DataError, match=r"mini: lm-eval could not get their data: .*mini.jsonl"):
        capability(str(run), ["mini"], task_folder=tasks)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        ModelError, match=r"capability needs lm-eval \(.*\): pip install 'ringfence\[lm-eval\]'"
    ):
        capability("default", ["arc_easy"])


def test_metrics_of_lm_eval() -> None:
    values = {
        "alias": "mini",
        "sample_len": 8,
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.2,
        "bleu,none": 3.5,
        "bleu_stderr,none": "N/A",
    }
    assert metrics(values) == {
        "acc": (0.5, 0.1),
        "exact_match,strict-match": (0.25, 0.2),
        "bleu": (3.5, None),
    }
