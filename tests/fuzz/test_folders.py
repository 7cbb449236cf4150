"""A finished run whose files were spoilt one at a time: by an editor, a full disk, a program."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ringfence.diagnose.folder import read_diagnoses
from ringfence.evaluate.answers.judged import read_judged
from ringfence.evaluate.answers.sampling import read_answers
from ringfence.report.card import run_card
from ringfence.report.export import export_runs
from ringfence.report.gate import gate_run, print_decision
from ringfence.report.page import write_page
from ringfence.report.read import read_rows
from ringfence.report.terminal import print_table
from ringfence.run.config import load_recipe
from ringfence.run.diagnose import diagnose_targets
from ringfence.run.evaluate import evaluate_target
from ringfence.run.record import Run
from ringfence.run.train import train_run

from .harness import knock, tries
from .mutations import files, json_lines, spoilt, texts
from .places import Place, copied

pytestmark = pytest.mark.slow

QUIET = Console(file=io.StringIO(), width=100)


def gate(folder: Path) -> None:
    print_decision(gate_run(folder), QUIET)


def report(folder: Path) -> None:
    records, rows = read_rows([folder])
    print_table(rows, QUIET)
    write_page(records, rows, folder / "report.html")


def train(folder: Path) -> None:
    """The same command again, with the recipe that the run was started with."""
    recipe = load_recipe(folder.parent / "recipe.yaml", [f"output={folder}"])
    train_run(recipe)


READERS: dict[str, tuple[float, Callable[[Path], Any]]] = {
    "gate": (0.05, gate),
    "export": (0.03, lambda folder: [export_runs([folder], form) for form in ("csv", "json")]),
    "card": (0.03, run_card),
    "report": (0.015, report),
    "diagnoses": (0.01, read_diagnoses),
    "evaluate": (0.015, lambda folder: evaluate_target(str(folder), [])),
    "train": (0.015, train),
    "diagnose": (0.01, lambda folder: diagnose_targets([str(folder)], ["logprob"], questions=4)),
}
SKIPPED = {"tokenizer.json", "report.html", "README.md"}


def strategy_of(file: Path) -> st.SearchStrategy[bytes]:
    """What may become of a file."""
    content = file.read_bytes()
    gone = st.one_of(st.just(b""), st.just(b"\n"), spoilt(content))
    if file.suffix == ".json":
        return st.one_of(files(json.loads(content)), gone)
    if file.suffix == ".jsonl":
        return st.one_of(json_lines([json.loads(line) for line in content.splitlines()]), gone)
    if file.suffix == ".yaml":
        return st.one_of(texts(content.decode()), gone)
    return gone


@pytest.fixture(scope="session")
def spoiling(home: Path) -> st.SearchStrategy[tuple[Path, bytes | None]]:
    """A file of the run, of its twin or of what it was measured against, and its new content (None:
    it is gone)."""
    found = [
        file for file in sorted(home.glob("r*/**/*")) if file.is_file() and file.name not in SKIPPED
    ]
    found = [file for file in found if file.stat().st_size < 200_000]
    own = [file for file in found if file.parent == home / "run"]

    def spoilt_file(file: Path) -> st.SearchStrategy[tuple[Path, bytes | None]]:
        content = st.one_of(*[strategy_of(file)] * 9, st.none())
        return content.map(lambda content: (file.relative_to(home), content))

    return st.one_of(st.sampled_from(own), st.sampled_from(own), st.sampled_from(found)).flatmap(
        spoilt_file
    )


@pytest.mark.parametrize("reader", READERS)
def test_spoilt_runs(reader: str, home: Path, spoiling: Any, place: Place) -> None:
    share, read = READERS[reader]

    @given(spoiling)
    @tries(share)
    def test(spoilt: tuple[Path, bytes | None]) -> None:
        name, content = spoilt
        folder = copied(home, place.fresh() / "home")
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        knock(
            f"run folder: {reader}",
            spoilt,
            lambda: read(folder / "run"),
            folder,
            [name.name, "run", "question"],
            seconds=60,
        )

    test()


@pytest.mark.parametrize(
    ("name", "read"), [("answers.jsonl", read_answers), ("judged.jsonl", read_judged)]
)
def test_spoilt_tables(name: str, read: Callable[[Path], Any], home: Path, place: Place) -> None:
    @given(strategy_of(home / "run" / name))
    @tries(0.02)
    def test(content: bytes) -> None:
        file = place.file(name, content)
        knock(f"table {name}", content, lambda: read(file), file.parent, [name])

    test()


def test_a_whole_run_is_read(home: Path, place: Place) -> None:
    folder = copied(home, place.fresh() / "home") / "run"
    for _, read in READERS.values():
        read(folder)
    assert Run(folder).trained
