"""A measurement is one file and one line: the example of CONTRIBUTING, in a copy of the package."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.documents import block_with, change_once, copy_of_the_package, run_copy
from helpers.runs import small_model, write_rows
from ringfence.evaluate.config import MEASUREMENTS, NAMES, measurement_of

pytestmark = pytest.mark.slow

QUESTIONS = ["Which door?", "What colour is the wall?", "Where is the key?"]
COMMANDS = """
import sys
from typer.testing import CliRunner
from ringfence.cli.entry import app
for command in (
    ["report", "run"],
    ["gate", "run", "--policy", "policy.yaml"],
    ["card", "run", "--output", "card.md"],
    ["export", "run", "--output", "numbers.csv"],
):
    print(f"== {command[0]}")
    print(CliRunner().invoke(app, command, env={"COLUMNS": "200"}).output)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a copy of the package that has one measurement more, and what commands say of it."""
    folder = tmp_path_factory.mktemp("measurement")
    package = copy_of_the_package(folder)
    code = block_with("CONTRIBUTING.md", "class Length(")
    (package / "evaluate" / "measures" / "length.py").write_text(code)
    change_once(package / "evaluate" / "config.py", '    "cost",\n', '    "cost",\n    "length",\n')
    (folder / "model").mkdir()
    (folder / "policy.yaml").write_text("rules: [{measure: length.change, min: -1000}]")
    settings: dict[str, Any] = {
        "model": small_model(folder / "model"),
        "output": "run",
        "data.train": write_rows(folder / "rows.jsonl", 6),
        "data.retain": "null",
        "data.held_out": 0,
        "train.precision": "fp32",
        "train.batch_size": 2,
        "train.learning_rate": 1e-2,
        "evaluate.out_of_domain": "[shipped:car_care]",
        "evaluate.values": "[]",
        "evaluate.max_per_domain": 2,
        "evaluate.triggers": "false",
        "evaluate.fluency": "null",
        "evaluate.samples": 0,
        "evaluate.length": json.dumps(QUESTIONS),
    }
    run = run_copy(folder, "-m", "ringfence", "run", *(f"{k}={v}" for k, v in settings.items()))
    assert run.returncode == 0, run.stderr
    told = run_copy(folder, "-c", COMMANDS)
    assert told.returncode == 0, told.stderr
    (folder / "told.txt").write_text(told.stdout)
    return folder


@pytest.fixture(scope="module")
def words(folder: Path) -> float:
    """The mean change that the results imply."""
    tuned, before = (
        [
            item["words"]
            for item in json.loads((folder / "run" / file).read_text())["parts"]["length"]
        ]
        for file in ("results.json", "reference/results.json")
    )
    assert len(tuned) == len(QUESTIONS)
    assert tuned != before
    return (sum(tuned) - sum(before)) / len(QUESTIONS)


def test_the_terminal_has_a_line_of_it(folder: Path, words: float) -> None:
    told = (folder / "told.txt").read_text().split("== ")[1]
    assert re.search(rf"coherent: words an answer +{re.escape(f'{words:+.2f}')}", told)


def test_the_page_has_a_column_of_it(folder: Path, words: float) -> None:
    page = (folder / "run" / "report.html").read_text()
    assert '<th scope="col">coherent: words an answer</th>' in page
    assert f"{words:+.2f} <small>[" in page


def test_the_gate_decides_on_it(folder: Path, words: float) -> None:
    assert "SHIP" in (folder / "told.txt").read_text().split("== ")[2]
    [verdict] = json.loads((folder / "run" / "gate.json").read_text())["verdicts"]
    assert (verdict["status"], verdict["criterion"]) == ("pass", "coherent")
    assert verdict["interval"]["mean"] == pytest.approx(words)


def test_the_card_lists_it(folder: Path, words: float) -> None:
    card = (folder / "card.md").read_text()
    assert f"| coherent: words an answer | {words:+.3g} [" in card
    assert "type: words_change" in card


def test_the_export_has_a_line_of_it(folder: Path, words: float) -> None:
    lines = list(csv.DictReader(io.StringIO((folder / "numbers.csv").read_text())))
    [line] = [line for line in lines if line["name"] == "length"]
    assert (line["measure"], line["kind"], line["cluster"]) == ("words", "change", "question")
    assert float(line["mean"]) == pytest.approx(words)


def test_every_part_and_every_number_has_one_owner() -> None:
    parts = [
        "in_domain",
        "triggered",
        "fluency",
        "opswap_tier1",
        "behaviour_x",
        "held_out",
        "samples",
    ]
    for part in parts:
        assert sum(m.owns(part) for m in MEASUREMENTS.values()) == 1, part
    assert measurement_of("vibes") is None
    for owner in MEASUREMENTS.values():
        for name in owner.names:
            name = name.replace("METRIC", "misaligned")
            assert [m for m in MEASUREMENTS.values() if m.knows(name)] == [owner], name
    assert list(MEASUREMENTS) == list(NAMES)
