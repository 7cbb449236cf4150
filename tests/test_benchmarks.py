"""The benchmarks run and say what they measured; how fast they are is no test's business."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "performance"
SMALL = ("--shape", "small", "--batch", "2", "--tokens", "144")


def run(script: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), "--results", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured once for all tests here."""
    folder = tmp_path_factory.mktemp("results")
    arms = ("kl", "ldifs + kl + treft", "kl on retain rows")
    run("steps.py", folder, *SMALL, "--sittings", "1", "--rounds", "1", "--arms", *arms)
    run("memory.py", folder, *SMALL, "--processes", "1", "--steps", "1", "--arms", "plain", "kl")
    return folder


def read(results: Path, name: str) -> dict[str, Any]:
    return json.loads((results / name).read_text())


def test_steps_are_compared_with_the_plain_ones(results: Path) -> None:
    found = read(results, "steps-small.json")
    arms = found["arms"]
    assert (found["shape"], found["batch"], found["tokens"]) == ("small", 2, 144)
    assert {name: arm["against"] for name, arm in arms.items()} == {
        "kl": "plain",
        "ldifs + kl + treft": "kl",
        "kl on retain rows": "plain",
    }
    for name, arm in arms.items():
        ours, theirs = (arm["seconds"][each] for each in (name, arm["against"]))
        assert 0 < ours["low"] <= ours["median"] <= ours["high"]
        # Of one round.
        assert arm["ratio"]["median"] == pytest.approx(ours["median"] / theirs["median"], rel=0.01)


def test_bounds_follow_from_the_operations(results: Path) -> None:
    """A reference pass is half of a LoRA step; a retain row, of the same length here, is a row and
    a pass."""
    found = read(results, "steps-small.json")
    bounds = {name: arm.get("bound") for name, arm in found["arms"].items()}
    assert bounds["kl"] == pytest.approx(1.05 * 1.5)
    assert found["retain tokens per training token"] == 0.5  # one for each step of two rows
    assert bounds["kl on retain rows"] == pytest.approx(1.05 * (1 + 1.5 * 0.5), abs=1e-3)


def test_memory_is_that_of_training(results: Path) -> None:
    arms = read(results, "memory-small.json")["arms"]
    assert arms["kl"]["ratio"]["total"] == pytest.approx(
        arms["kl"]["total"]["median"] / arms["plain"]["total"]["median"], abs=1e-3
    )
    assert all(arm["above"]["median"] > 0 for arm in arms.values())
    assert arms["kl"]["bound"] == 1.1


def test_the_table_says_what_is_not_reached(results: Path, tmp_path: Path) -> None:
    steps = read(results, "steps-small.json")
    for name, median in (("kl", 1.5), ("ldifs + kl + treft", 1.5)):
        steps["arms"][name]["ratio"] = {"median": median, "low": 1.25, "high": 1.75, "n": 5}
    (tmp_path / "steps-small.json").write_text(json.dumps(steps))
    printed = run("table.py", tmp_path, "--figures", str(tmp_path))
    assert printed.strip() == (tmp_path / "table.md").read_text().strip()
    assert "| kl | 1.500 (1.250 to 1.750) | at most 1.575 | yes |" in printed
    assert (
        "| ldifs + kl + treft (against kl) | 1.500 (1.250 to 1.750) | at most 1.050 | **no** |"
        in printed
    )
    assert b"<svg" in (tmp_path / "ratios.svg").read_bytes()
