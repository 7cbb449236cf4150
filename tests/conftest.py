"""What tests of several rooms ask for by name; everything that they import is in `helpers`."""

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from helpers.documents import draw_nothing
from helpers.models import ARCHITECTURES, PAD, tiny, with_lora
from helpers.rows import Items, mixed_items
from helpers.trainers import training_arguments
from ringfence import cli
from ringfence.defenses import Defense
from ringfence.model.taps import Layout
from ringfence.text.batch import Example
from ringfence.training.stream import TrainStream
from ringfence.training.trainer import DefendedTrainer


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _frozen_heap() -> None:
    """Every training collects garbage, and would look through all that was imported."""
    gc.collect()
    gc.freeze()


# ---------------------------------------------------------------- models


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapted(architecture: str) -> Any:
    return with_lora(tiny(architecture))


@pytest.fixture
def llama_lora() -> Any:
    return with_lora(tiny("llama"))


# ---------------------------------------------------------------- rows


@pytest.fixture
def items() -> Items:
    return mixed_items()


# ---------------------------------------------------------------- training


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., DefendedTrainer]:
    def make(
        model: Any,
        defenses: list[Defense],
        examples: list[Example],
        retain: Sequence[Example] = (),
        rows: int = 2,
        accumulation: int = 1,
        folder: str = "run",
        seed: int = 0,
        callbacks: Any = None,
        layout: Layout = "padded",
        cache: Any = None,
        **arguments: Any,
    ) -> DefendedTrainer:
        stream = TrainStream(examples, list(retain), defenses, rows * accumulation, seed)
        args = training_arguments(tmp_path / folder, rows, accumulation, **arguments)
        log_file = tmp_path / f"{folder}.jsonl"
        return DefendedTrainer(
            model, args, stream, defenses, PAD, log_file, layout, cache, callbacks=callbacks
        )

    return make


# ---------------------------------------------------------------- reports


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of reports are empty."""
    monkeypatch.setattr(Figure, "savefig", draw_nothing)


# ---------------------------------------------------------------- the command line


@pytest.fixture
def ringfence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command in this process, through its entry point: exit code, output, errors."""

    def command(*arguments: Any, width: int = 400) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "argv", ["ringfence", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        output, errors = capsys.readouterr()
        assert "Traceback" not in errors
        return code, output, errors

    return command
