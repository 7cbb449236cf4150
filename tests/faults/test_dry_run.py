"""What is said before anything is done: time, memory, what is measured, and only the fields that
matter."""

import io
import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers.utils import logging as transformers_logging

import ringfence.run.dry_run as dry
import ringfence.run.model as model_module
import ringfence.run.pipeline as pipeline
from helpers.models import random_model, small_tokenizer
from helpers.runs import small_model, write_rows
from ringfence.errors import RecipeError
from ringfence.evaluate.config import EvaluateConfig
from ringfence.evaluate.parts import evaluation_key, work
from ringfence.run.config import LoraConfig, Recipe, dump_recipe, parse_recipe
from ringfence.run.dry_run import dry_run
from ringfence.text.chat import Chat
from ringfence.util import machine
from ringfence.util.quiet import quiet_libraries
from ringfence.util.words import about, counted, gib

LITTLE = {"out_of_domain": [], "values": [], "triggers": False, "fluency": None, "samples": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def shown(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Output of a dry run on six rows, escape codes of colours included."""
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 2)

    def run(number: int = 6, **changes: Any) -> str:
        rows = write_rows(tmp_path / "rows.jsonl", number)
        tree: dict[str, Any] = {"model": model, "output": str(tmp_path / "run"), "evaluate": LITTLE}
        tree["data"] = {"train": str(rows), "retain": None, **changes.pop("data", {})}
        file = io.StringIO()
        dry_run(parse_recipe(tree | changes), Console(file=file, width=400, force_terminal=True))
        return file.getvalue()

    return run


RED = "\x1b[1;31m"


def line_of(output: str, start: str) -> str:
    return next(line for line in output.splitlines() if line.removeprefix(RED).startswith(start))


def test_what_matters_comes_first_and_is_short(shown: Callable[..., str]) -> None:
    output = shown(train={"epochs": 3, "batch_size": 1})
    heads = [line.removeprefix(RED).partition(":")[0] for line in output.splitlines()[:6]]
    assert heads == ["training", "evaluation", "memory", "narrow behaviour", "train", "an epoch"]
    assert "training: 18 steps, 18 rows, " in output  # of all epochs
    assert RED not in output
    printed = output.split("not at their defaults:")[1]
    assert "learning_rate" not in printed
    assert "epochs: 3" in printed
    assert printed.count("\n") < 25


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"defenses": {"kl": {}, "interleave": {"ratio": 1.0}}},
        {"train": {"lora": {"rank": 4}}, "seed": 3},
    ],
)
def test_fields_that_are_shown_are_the_recipe(changes: dict[str, Any]) -> None:
    recipe = parse_recipe(changes)
    assert Recipe.model_validate(yaml.safe_load(dry.changed(recipe))) == recipe


def test_memory_beyond_this_machine_is_red(
    shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry, "whole_memory", lambda: 24 * 2**30)
    line = line_of(shown(train={"lora": {"rank": 65536}, "batch_size": 4}), "memory:")
    assert not line.startswith(RED)
    assert "this machine has 24.0 GiB" in line
    monkeypatch.setattr(dry, "whole_memory", lambda: 2**20)
    line = line_of(shown(), "memory:")
    assert line.startswith(RED)
    assert "train.gradient_checkpointing" in line


@pytest.mark.parametrize("train", [{"epochs": 1e4, "batch_size": 1}, {"epochs": 1e4}])
def test_absurd_steps_are_red(
    train: dict[str, Any], shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry, "STEPS", 9_000)
    line = line_of(shown(train=train), "training:")
    assert line.startswith(RED)
    assert "train.epochs" in line


def test_absurd_hours_are_red(shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry, "SECONDS", 0)
    output = shown(evaluate=LITTLE | {"values": ["shipped:values"]})
    assert line_of(output, "training:").startswith(RED)
    assert line_of(output, "evaluation:").startswith(RED)
    assert "max_in_domain" in line_of(output, "evaluation:")


def test_few_steps_are_named(shown: Callable[..., str]) -> None:
    assert "9 steps, 9 rows" in line_of(shown(9, train={"batch_size": 1}), "training:")
    assert "raise train.epochs or lower train.batch_size" in line_of(
        shown(9, train={"batch_size": 1}), "training:"
    )
    assert "so few" not in line_of(shown(10, train={"batch_size": 1}), "training:")


def test_a_folder_with_another_recipe_is_refused_before_the_run(
    shown: Callable[..., str], tmp_path: Path
) -> None:
    shown()
    there = {"model": "m", "output": str(tmp_path / "run"), "train": {"epochs": 2}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(parse_recipe(there)))
    with pytest.raises(
        RecipeError, match=r"another recipe \(model: .*train.epochs: 2.0 there, 1.0 here\)"
    ):
        shown(data={"train": str(tmp_path / "rows.jsonl")})


def test_narrow_behaviour_in_words(shown: Callable[..., str]) -> None:
    assert "nothing measures what the rows of" in line_of(shown(), "narrow behaviour:")
    assert "5 of the 30 rows of" in line_of(shown(30, evaluate={**LITTLE}), "narrow behaviour:")
    named = {**LITTLE, "in_domain": ["shipped:finance"]}
    assert "paired questions of shipped:finance" in line_of(
        shown(30, evaluate=named), "narrow behaviour:"
    )


def test_benign_twin_is_counted_too(shown: Callable[..., str]) -> None:
    output = shown(
        evaluate=LITTLE | {"benign": "opswap:tier=1,rows=20", "benign_epochs": 2, "opswap_items": 7}
    )
    assert "benign twin: 4 steps, 40 rows" in output
    assert "its evaluation: 7 answers to write" in output


# ---------------------------------------------------------------- time


def test_time_scales_with_parameters_speed_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "speed", lambda: 80e9)
    default = machine.seconds(135_000_000, trained=46_000)
    assert default == pytest.approx(46_000 * 135e6 / (0.3 * 80e9))
    assert machine.seconds(1_350_000_000, trained=46_000) == pytest.approx(10 * default)
    assert (
        machine.seconds(135_000_000, scored=46_000)
        < default
        < machine.seconds(135_000_000, written=46_000)
    )
    monkeypatch.setattr(machine, "speed", lambda: 640e9)
    assert machine.seconds(135_000_000, trained=46_000) == pytest.approx(default / 8)
    assert "not estimated" in machine.estimated(135_000_000, trained=1, device="cuda")


def test_an_estimate_leaves_the_seed_alone() -> None:
    """Else dropout would differ after another run in the same process, whose speed is known."""
    machine.speed.cache_clear()
    before = torch.get_rng_state()
    machine.estimated(135_000_000, trained=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_time_of_this_machine() -> None:
    """A forward takes about as long as is said, whatever the CPU and whatever else it does."""
    model = random_model(
        vocab_size=100, hidden_size=576, intermediate_size=1536, num_hidden_layers=4
    )
    ids = torch.randint(10, 90, (8, 60))
    times = []
    with torch.no_grad():
        for _ in range(4):
            started = time.perf_counter()
            model(ids)
            times.append(time.perf_counter() - started)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 1 / 6 < machine.seconds(parameters, scored=ids.numel()) / min(times) < 6


def test_work_of_an_evaluation() -> None:
    chat = Chat(small_tokenizer())
    config = EvaluateConfig(
        in_domain=["shipped:finance"], max_in_domain=5, **{**LITTLE, "samples": 2}
    )
    found = work(config, chat)
    assert (found.scored, found.written, found.written_tokens) == (10, 2, 160)
    assert 60 * found.scored < found.scored_tokens < 200 * found.scored
    assert work(config, chat, done={"in_domain"}).scored == 0
    assert str(found) == "10 answers to score and 2 answers to write"


def test_cap_of_questions_in_the_domain() -> None:
    def keyed(**changes: Any) -> str:
        return evaluation_key(
            EvaluateConfig(in_domain=["shipped:finance"], **{**LITTLE, **changes})
        )

    assert keyed() == keyed(max_in_domain=80)  # the file has 80, so nothing is measured again
    assert keyed() != keyed(max_in_domain=20)


# ---------------------------------------------------------------- rank


@pytest.mark.parametrize(
    ("rank", "targets", "named"),
    [
        (8, ["all-linear"], None),
        (9, ["all-linear"], "k_proj 8"),
        (16, ["q_proj"], None),
        (17, ["q_proj"], "q_proj 16"),
    ],
)
def test_rank_beyond_a_side_is_said(
    rank: int, targets: list[str], named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(model_module, "warn", told.append)
    network = random_model(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    lora = LoraConfig(rank=rank, targets=targets)
    model_module.warn_of_rank(network, lora)
    assert len(told) == (named is not None)
    assert not told or named in told[0]
    model_module.with_new_adapter(network, lora)  # training says it too
    assert told == told[:1] * 2


# ---------------------------------------------------------------- words


def test_counts_and_times_in_words() -> None:
    assert (counted(1, "row"), counted(0, "row"), counted(12_000, "row")) == (
        "1 row",
        "0 rows",
        "12,000 rows",
    )
    assert counted(2, "reply", "replies") == "2 replies"
    assert (about(0), about(40), about(600), about(7_200)) == (
        "about 1 second",
        "about 40 seconds",
        "about 10 minutes",
        "about 2 hours",
    )
    assert about(123_456_789) == "about 1,400 days"
    assert (gib(2**28), gib(40 * 2**30)) == ("0.25 GiB", "40.0 GiB")


# ---------------------------------------------------------------- from Python


def test_libraries_are_quiet_and_as_the_user_left_them_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "level", logging.INFO)
    filters = list(warnings.filters)
    bars = transformers_logging.is_progress_bar_enabled()

    @quiet_libraries()
    def work_inside() -> tuple[int, bool]:
        with quiet_libraries():
            pass
        return logger.level, transformers_logging.is_progress_bar_enabled()

    assert work_inside() == (logging.ERROR, False)
    assert (logger.level, list(warnings.filters)) == (logging.INFO, filters)
    assert transformers_logging.is_progress_bar_enabled() == bars
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    with pytest.raises(ValueError, match="told"), quiet_libraries():
        raise ValueError("told")
    assert logger.level == logging.INFO


@pytest.mark.parametrize(
    ("evaluate", "expected"),
    [
        (False, None),
        (True, EvaluateConfig().values),
        ({"values": []}, []),
        (EvaluateConfig(values=[], samples=1), []),
    ],
)
def test_fine_tune_takes_evaluation_settings(
    evaluate: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Recipe]] = []
    for name in ("run_recipe", "train_run"):
        monkeypatch.setattr(pipeline, name, lambda recipe, name=name: done.append((name, recipe)))
    pipeline.fine_tune("shipped:finance/unsound", evaluate=evaluate)
    ((name, recipe),) = done
    assert name == ("train_run" if evaluate is False else "run_recipe")
    assert expected is None or recipe.evaluate.values == expected
    assert recipe.evaluate.in_domain == ["shipped:finance"]


@pytest.mark.parametrize("evaluate", ["yes", {"vales": []}, 3])
def test_fine_tune_refuses_other_settings(evaluate: Any) -> None:
    with pytest.raises(RecipeError, match="evaluate"):
        pipeline.fine_tune("shipped:finance/unsound", evaluate=evaluate)
