"""How much faster answers of the embedded model are scored in batches than by typical research
scripts.

    python benchmarks/performance/scoring.py [--quick]    # about 8 minutes on two CPU cores

Perplexity gap: safe rows under the model and K of its adapters (random ones of rank 32; their
content does not change the time). `score_under` goes through all models batch by batch. A script
goes row by row through the models, with the whole sequence's logits, and has one model in memory:
at each switch the next one is loaded (its whole weights, or only the adapter; both measured on a
few rows), or all adapters are in memory and one is switched on.

Paired evaluation: two answers to each question. `score_answers` computes the prompt once for both
and makes only the answers' logits. A script runs the model with labels for each question and
answer. An evaluation compares a model with its reference, whose scores are kept: from the second
run on, the script scores two models and ringfence one.

All ways take turns; a ratio is that of one turn, a figure is the median over turns. The scores are
compared first.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from record import RESULTS, save, spread  # type: ignore[import-not-found]

from ringfence.evaluate.config import EvaluateConfig
from ringfence.model.files import load_tokenizer
from ringfence.model.loading import load_model
from ringfence.model.scoring import score_answers, score_under
from ringfence.prepare.gap import adapter_folders, load_adapted, settings
from ringfence.text.chat import Chat
from ringfence.text.roles import Messages, Role, Row
from ringfence.text.rows import PairedQuestion, load_questions, load_rows

MODEL, BATCH_TOKENS = "default", EvaluateConfig().batch_tokens
TOLERANCE = 0.05  # nats per token: how far scores in bf16 differ between batchings

Scores = list[float]


def naive_score(model: Any, chat: Chat, messages: Messages) -> float:
    """Mean log-probability of the last answer, from the model's own loss."""
    encoded = chat.encode(messages)
    last = len(encoded.roles) - encoded.roles[::-1].index(Role.RESPONSE)
    labels = [-100] * len(encoded.roles)
    while last and encoded.roles[last - 1] == Role.RESPONSE:
        last -= 1
        labels[last] = encoded.input_ids[last]
    ids = torch.tensor([encoded.input_ids], device=model.device)
    with torch.no_grad():
        return -float(model(input_ids=ids, labels=torch.tensor([labels], device=model.device)).loss)


def take_turns(ways: dict[str, Callable[[], Scores]], turns: int) -> dict[str, list[float]]:
    """Seconds of each way, by turn. The first turn compares the scores and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores = {name: way() for name, way in ways.items()}
    for name, found in scores.items():
        known = next(iter(scores.values()))[: len(found)]
        apart = max(abs(a - b) for a, b in zip(found, known, strict=True))
        print(f"{name}: {len(found)} scores, {apart:.4f} nats per token apart at most", flush=True)
        assert apart < TOLERANCE, f"{name}: its scores differ"
    for _ in range(turns):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(
    seconds: dict[str, list[float]], slow: str, fast: str, factor: float = 1.0
) -> dict[str, float]:
    """How many times faster, turn by turn."""
    return spread([factor * a / b for a, b in zip(seconds[slow], seconds[fast])], 3)


# ------------------------------------------------------------------ perplexity gap


def save_adapters(count: int, folder: Path) -> list[str]:
    """Adapters that each change the model a little."""
    for number in range(count):
        torch.manual_seed(number)
        config = LoraConfig(
            r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model: Any = get_peft_model(load_model(MODEL), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=1e-3)
        model.save_pretrained(folder / str(number) / "adapter")
    return [str(folder / str(number)) for number in range(count)]


def save_merged(adapter: Path) -> str:
    """The model with an adapter in its weights."""
    folder = adapter.parent / "merged"
    merged: Any = PeftModel.from_pretrained(load_model(MODEL), adapter).merge_and_unload()
    merged.save_pretrained(folder)
    return str(folder)


def gap(
    chat: Chat, rows: list[Row], from_file: int, turns: int, adapters: int = 2
) -> dict[str, Any]:
    """Batches and the three scripts; `from_file`: number of rows for which models or adapters are
    loaded from their files."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = adapter_folders(save_adapters(adapters, Path(temporary)), MODEL)
        whole = [MODEL, *(save_merged(folder) for folder in folders.values())]
        model, base = load_adapted(MODEL, folders, "bf16"), load_model(MODEL)
        each = settings(model, adapters)

        def batched() -> Scores:
            found = {
                place: [score.mean for score in scores]
                for batch in score_under(model, chat, rows, each, BATCH_TOKENS)
                for place, scores in batch.items()
            }
            return [score for place in range(len(rows)) for score in found[place]]

        def switched() -> Scores:
            found = []
            for row in rows:
                for setting in each:
                    with setting():
                        found.append(naive_score(model, chat, row.messages))
            return found

        def whole_loaded() -> Scores:
            return [
                naive_score(load_model(name), chat, row.messages)
                for row in rows[:from_file]
                for name in whole
            ]

        def loaded() -> Scores:
            found = []
            for row in rows[:from_file]:
                found.append(naive_score(base, chat, row.messages))
                for folder in folders.values():
                    adapted = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
                    found.append(naive_score(adapted.eval(), chat, row.messages))
                    adapted.unload()
            return found

        ways = {"batched": batched, "switched": switched, "loaded": loaded}
        seconds = take_turns(ways | {"whole loaded": whole_loaded}, turns)
    return {
        "rows": len(rows),
        "adapters": adapters,
        "seconds": {name: spread(taken) for name, taken in seconds.items()},
        "rows with models from their files": from_file,
        "switched": ratios(seconds, "switched", "batched"),
        **{
            way: ratios(seconds, way, "batched", len(rows) / from_file)
            for way in ("loaded", "whole loaded")
        },
    }


# ------------------------------------------------------------------ paired evaluation


def paired(chat: Chat, questions: list[PairedQuestion], turns: int) -> dict[str, Any]:
    model = load_model(MODEL)
    prompts = [[{"role": "user", "content": q.question}] for q in questions]
    answers = [(q.aligned, q.misaligned) for q in questions]

    def batched() -> Scores:
        found = score_answers(model, chat, prompts, answers, BATCH_TOKENS)
        return [score.mean for pair in found for score in pair]

    def one_by_one() -> Scores:
        return [
            naive_score(model, chat, [*prompt, {"role": "assistant", "content": answer}])
            for prompt, pair in zip(prompts, answers)
            for answer in pair
        ]

    seconds = take_turns({"batched": batched, "one by one": one_by_one}, turns)
    return {
        "questions": len(questions),
        "seconds": {name: spread(taken) for name, taken in seconds.items()},
        "one by one": ratios(seconds, "one by one", "batched"),
        "one by one, reference kept": ratios(seconds, "one by one", "batched", 2.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few rows, one turn")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measurements")
    given = parser.parse_args()
    rows, from_file, each, turns = (4, 1, 1, 1) if given.quick else (24, 3, 6, 5)
    chat, config = Chat(load_tokenizer(MODEL)), EvaluateConfig()
    sources = ["shipped:finance", *config.out_of_domain, *config.values]
    questions = [
        question for source in sources for question in load_questions(source, "test")[:each]
    ]
    found = {
        "batch_tokens": BATCH_TOKENS,
        "gap": gap(chat, load_rows("shipped:retain")[:rows], from_file, turns),
        "paired": paired(chat, questions, turns),
    }
    save(given.results / "scoring.json", found)
    for part in ("gap", "paired"):
        print(part, found[part])


if __name__ == "__main__":
    main()
