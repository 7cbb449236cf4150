"""Results are keyed by content, a folder is enough to report them, and models are asked in our way
alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from helpers.models import ARCHITECTURES, random_model, small_tokenizer
from ringfence.errors import DataError
from ringfence.model.fingerprint import fingerprint
from ringfence.model.generation import generate_greedy
from ringfence.report.read import read_rows
from ringfence.run.evaluate import evaluate_target
from ringfence.text.chat import Chat

SMALL = [
    "evaluate.in_domain=[]",
    "evaluate.out_of_domain=[shipped:car_care]",
    "evaluate.values=[]",
    "evaluate.max_per_domain=2",
    "evaluate.triggers=false",
    "evaluate.fluency=null",
    "evaluate.samples=0",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


def write(folder: Path, tokenizer: Any, seed: int) -> str:
    random_model(seed=seed, max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def shift(folder: Path) -> tuple[float, Any]:
    _, (row,) = read_rows([folder])
    return row.pairs.margins["out_of_domain"].mean, row.sets["out_of_domain"].shift.mean


def test_other_weights_under_one_name_are_measured_again(tmp_path: Path, tokenizer: Any) -> None:
    model, reference = (
        write(tmp_path / name, tokenizer, seed) for seed, name in enumerate(("model", "reference"))
    )
    folder = evaluate_target(model, SMALL, reference, output=tmp_path / "here")
    first = shift(folder)
    write(Path(model), tokenizer, 2)
    assert fingerprint(model) != fingerprint(reference)
    evaluate_target(model, SMALL, reference, output=folder)
    second = shift(folder)
    assert second[0] != first[0]
    write(Path(reference), tokenizer, 3)
    evaluate_target(str(folder), [])
    third = shift(folder)
    assert third[0] == second[0]
    assert third[1] != second[1]
    # As if measured for the first time.
    fresh = evaluate_target(model, SMALL, reference, output=tmp_path / "elsewhere" / "fresh")
    assert shift(fresh) == third
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    evaluate_target(str(folder), [])
    assert shift(folder)[0] != third[0]


def test_a_folder_without_the_references_is_reported(tmp_path: Path, tokenizer: Any) -> None:
    model, reference = (
        write(tmp_path / name, tokenizer, seed) for seed, name in enumerate(("model", "reference"))
    )
    folder = evaluate_target(model, SMALL, reference, output=tmp_path / "here")
    shutil.copytree(folder, tmp_path / "away" / "copy")
    for shared in tmp_path.glob("reference-*"):
        shutil.rmtree(shared)
    assert shift(tmp_path / "away" / "copy") == shift(folder)


def test_answers_of_other_weights_are_refused_before_anything_is_measured(
    tmp_path: Path, tokenizer: Any
) -> None:
    model, asked = write(tmp_path / "model", tokenizer, 0), tmp_path / "open.jsonl"
    asked.write_text(json.dumps({"id": "q", "question": "What now?"}))
    answers = {"questions": [str(asked)], "samples": 1, "max_new_tokens": 2, "calibrate_on": None}
    folder = evaluate_target(
        model, [*SMALL, f"evaluate.answers={json.dumps(answers)}"], output=tmp_path / "here"
    )
    before = {file.name: file.read_bytes() for file in folder.glob("*s.json*")}
    write(Path(model), tokenizer, 1)
    for overrides in ([], ["evaluate.answers=null"]):
        with pytest.raises(DataError, match=r"answers.jsonl: holds answers of another model"):
            evaluate_target(str(folder), overrides)
        assert {
            name: (folder / name).read_bytes()
            for name in before
            if "answers" in name or "results" in name
        } == {
            name: content
            for name, content in before.items()
            if "answers" in name or "results" in name
        }


def test_a_fingerprint_is_of_content_and_base(tmp_path: Path, tokenizer: Any) -> None:
    model = Path(write(tmp_path / "model", tokenizer, 0))
    first = fingerprint(str(model))
    copy = shutil.copytree(model, tmp_path / "copy")
    assert fingerprint(str(copy)) == first
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    of_adapter = fingerprint(str(adapter))
    write(model, tokenizer, 1)
    assert fingerprint(str(model)) != first
    assert fingerprint(str(adapter)) != of_adapter
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool.jinja").write_text("x")
    assert fingerprint(str(copy)) != first


HOSTILE: list[dict[str, Any]] = [
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"suppress_tokens": list(range(40_000))},
    {
        "begin_suppress_tokens": list(range(40_000)),
        "forced_eos_token_id": 5,
        "forced_bos_token_id": 6,
    },
    {
        "min_length": 500,
        "min_new_tokens": 5,
        "max_length": 3,
        "max_time": 1e-9,
        "stop_strings": ["e"],
    },
    {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.1, "num_beams": 3},
    {
        "repetition_penalty": 1.9,
        "no_repeat_ngram_size": 1,
        "bad_words_ids": [[n] for n in range(3, 40_000, 7)],
    },
    {
        "sequence_bias": [[[9], 99.0]],
        "exponential_decay_length_penalty": (1, 9.0),
        "guidance_scale": 3.0,
    },
    {"return_dict_in_generate": True, "output_scores": True, "prompt_lookup_num_tokens": 2},
]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_what_a_model_says_of_its_decoding_changes_nothing(name: str, tokenizer: Any) -> None:
    config_class, model_class, extra = ARCHITECTURES[name]
    model, chat = random_model(config_class, model_class, **extra), Chat(tokenizer)
    texts = [
        "Hello",
        "Hello",
        "What is it?",
        "Hello",
        "Tell me a longer story than that, will you?",
    ]
    prompts: list[Any] = [[{"role": "user", "content": text}] for text in texts]
    plain = generate_greedy(model, chat, prompts, 6, 4096)
    alone = [generate_greedy(model, chat, [prompt], 6, 4096)[0] for prompt in prompts]
    assert plain == alone
    for settings in HOSTILE:
        own = model.generation_config = GenerationConfig(eos_token_id=2, **settings)
        assert generate_greedy(model, chat, prompts, 6, 4096) == plain, settings
        assert model.generation_config is own
