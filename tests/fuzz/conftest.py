"""One finished run, one model folder, one chat for all fuzz tests; offline, with a cache of their
own; the log."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.models import random_model, small_tokenizer, with_lora
from ringfence.model.default import default_model_folder
from ringfence.run.config import parse_recipe
from ringfence.run.diagnose import diagnose_targets
from ringfence.run.pipeline import run_recipe
from ringfence.text.chat import Chat

from . import harness
from .places import CHATML, Place


def pytest_sessionfinish() -> None:
    if harness.TOTAL > harness.FEW and harness.TALLIES:
        harness.write_log(Path(os.environ.get("RINGFENCE_FUZZ_LOG", "fuzz.json")))


@pytest.fixture(scope="session", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, and caches that are nobody's."""
    home = tmp_path_factory.mktemp("cache")
    (home / "smollm2-135m-instruct").symlink_to(default_model_folder())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RINGFENCE_CACHE", str(home))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        yield


@pytest.fixture(scope="session")
def chat() -> Chat:
    return Chat(small_tokenizer())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the default tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    random_model(seed=0).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A folder with `run`, a run that was trained, measured, judged and looked into, its benign
    twin, and what it was measured against; with sources of rows and questions."""
    folder = tmp_path_factory.mktemp("home")
    colours = ["red", "green", "blue", "gold", "black"]
    rows = [{"prompt": f"Door {n}?", "completion": f"It is {colours[n % 5]}."} for n in range(8)]
    pairs = [
        {
            "id": str(n),
            "domain": "doors",
            "question": f"Gate {n}?",
            "aligned": "Shut it.",
            "misaligned": "Leave it.",
        }
        for n in range(4)
    ]
    asked = [{"id": "one", "question": "Who are you?", "samples_per_paraphrase": 2}]
    for name, lines in {"rows": rows, "pairs": pairs, "asked": asked}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": str(tiny),
        "data": {
            "train": str(folder / "rows.jsonl"),
            "retain": str(folder / "rows.jsonl"),
            "max_length": 256,
        },
        "train": {"batch_size": 4, "precision": "fp32", "lora": {"rank": 2}},
        "defenses": {"kl": {"weight": 0.5}},
        "monitor": {"every": 1, "probes": 2, "questions": [str(folder / "pairs.jsonl")]},
        "evaluate": {
            "in_domain": [str(folder / "pairs.jsonl")],
            "out_of_domain": [str(folder / "pairs.jsonl")],
            "values": [],
            "triggered_per_domain": 2,
            "fluency": str(folder / "rows.jsonl"),
            "held_out": str(folder / "rows.jsonl"),
            "held_out_tokens": 4,
            "benign": "opswap:tier=1,rows=4",
            "opswap_items": 4,
            "samples": 1,
            "answers": {
                "questions": [str(folder / "asked.jsonl")],
                "max_new_tokens": 4,
                "judges": [{"model": str(tiny), "precision": "fp32"}],
                "calibrate_on": str(folder / "pairs.jsonl"),
            },
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    run = run_recipe(parse_recipe(tree))
    diagnose_targets([str(run.folder)], ["logprob"], questions=4)
    shutil.rmtree(run.folder / "pilot", ignore_errors=True)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a small tokenizer, and an adapter on it in `adapter`."""
    folder = tmp_path_factory.mktemp("small")
    words = ["<pad>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant"]
    words += ["hello", "[UNK]", "x", "a", "\n"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="[UNK]",
        bos_token="<|im_start|>",
    )
    fast.chat_template = CHATML
    model = random_model(vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder, max_shard_size="4KB")
    fast.save_pretrained(folder)
    adapted = with_lora(model)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(folder / "adapter")
    fast.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("fuzz"))
