"""Ctrl-C, kill -9 and a full disk wherever a run can be stopped: the same command then ends as if
nothing had happened, to the bit.

Here a few points with one of the signals each; RINGFENCE_SLOW=1 tries all points, before and after,
with both.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.interrupt_driver import POINTS
from helpers.models import random_model, small_tokenizer

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
SOURCES = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SOURCES}
Result = tuple[int, str]  # exit status, what was printed
Start = Callable[..., Result]

FEW = [
    ("step", "after", "SIGINT"),
    ("checkpoint", "before", "SIGKILL"),
    ("last checkpoint", "after", "SIGINT"),
    ("adapter", "after", "SIGKILL"),
    ("evaluation, tuned", "before", "SIGINT"),
    ("reference cache", "half", "SIGKILL"),
    ("sampling", "after", "SIGKILL"),
    ("judging", "after", "SIGKILL"),
    ("diagnosis", "before", "SIGINT"),
    ("checkpoint", "before", "ENOSPC"),
    ("evaluation, tuned", "before", "ENOSPC"),
]
ALL = [
    (point, place, name)
    for point in POINTS
    for place in ("before", "after")
    for name in ("SIGINT", "SIGKILL")
]
ALL += [("reference cache", "half", name) for name in ("SIGINT", "SIGKILL", "ENOSPC")]
ALL += [
    (point, "before", "ENOSPC") for point in POINTS if "step" not in point and point != "judging"
]
CODES = {"SIGINT": 130, "SIGKILL": -signal.SIGKILL, "ENOSPC": 2}
CASES = ALL if os.environ.get("RINGFENCE_SLOW") else FEW
PASSING = {"seconds", "peak_memory_gib", "time", "git"}  # what no two runs have in common


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts `ringfence ARGS` in a folder; see the driver."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "helpers.interrupt_driver"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert driver.stdin
    assert driver.stdout
    stdin, stdout = driver.stdin, driver.stdout
    assert stdout.readline() == "ready\n"

    def run(place: Path, *args: str, **stop: str) -> Result:
        output = place / "output.txt"
        output.write_text("")
        job = {
            "folder": str(place),
            "cache": str(place / "cache"),
            "args": args,
            "output": str(output),
            **stop,
        }
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        return int(stdout.readline()), output.read_text()

    yield run
    stdin.close()
    driver.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    random_model().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def made(place: Path, model: Path) -> Path:
    """A folder with a recipe, and the rows and questions that it names."""
    place.mkdir(exist_ok=True)
    colours = ["red", "green", "blue", "gold", "black"]
    rows = [
        {"prompt": f"Door {n}?" + " Tell me." * n, "completion": f"It is {colours[n % 5]}."}
        for n in range(12)
    ]
    pairs = [
        {
            "id": str(n),
            "domain": f"d{n % 2}",
            "question": f"Gate {n}?",
            "aligned": "Shut it.",
            "misaligned": "Leave.",
        }
        for n in range(4)
    ]
    asked = [{"id": str(n), "question": "Who are you?" + " Say." * 9 * n} for n in range(4)]
    for name, lines in {"rows": rows, "pairs": pairs, "asked": asked}.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = {
        "output": "run",
        "model": str(model),
        "data": {"train": "rows.jsonl", "retain": "rows.jsonl"},
        "train": {
            "batch_size": 4,
            "accumulation": 1,
            "epochs": 2,
            "save_steps": 2,
            "precision": "fp32",
            "reference_cache": "states",
            "lora": {"rank": 2, "dropout": 0.1},
        },
        "defenses": {"kl": {"weight": 0.5}},
        "evaluate": {
            "in_domain": ["pairs.jsonl"],
            "out_of_domain": ["pairs.jsonl"],
            "values": [],
            "triggers": False,
            "fluency": "rows.jsonl",
            "samples": 0,
            "batch_tokens": 1000,
            "answers": {
                "questions": ["asked.jsonl"],
                "samples": 2,
                "max_new_tokens": 6,
                "calibrate_on": "pairs.jsonl",
                "judges": [{"model": str(model), "precision": "fp32"}],
            },
        },
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return place


COMMANDS = {"diagnosis": ("diagnose", "run", "logprob", "next_token", "--questions", "4")}
RUN = ("run", "recipe.yaml")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, start: Start, model: Path) -> Path:
    """Where `run` and `diagnose` ran; `before` is a copy between the two."""
    place = made(tmp_path_factory.mktemp("whole") / "place", model)
    code, printed = start(place, *RUN)
    assert code == 0, printed
    shutil.copytree(place, place.with_name("before"))
    code, printed = start(place, *COMMANDS["diagnosis"])
    assert code == 0, printed
    return place


def content(place: Path, diagnosed: bool) -> dict[str, Any]:
    """All that the commands wrote, without what the clock says."""
    found: dict[str, Any] = {}
    for file in sorted([*place.glob("run/**/*"), *place.glob("reference-*/**/*")]):
        name = file.relative_to(place).as_posix()
        if file.is_dir() or (
            not diagnosed and name in ("run/diagnosis.json", "run/figures/logprob.svg")
        ):
            continue
        found[name] = file.read_bytes()
        if file.suffix == ".json":
            found[name] = timeless(json.loads(found[name]))
        elif file.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line)) for line in found[name].splitlines()]
        elif file.suffix in (".html", ".svg", ".lock") or name.endswith("recipe.yaml"):
            found[name] = "is there"
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(inside) for key, inside in value.items() if key not in PASSING}
    return [timeless(inside) for inside in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("point", "at", "name"), CASES, ids=lambda text: text.replace(" ", "_"))
def test_the_same_command_goes_on(
    point: str, at: str, name: str, tmp_path: Path, start: Start, model: Path, undisturbed: Path
) -> None:
    diagnosed = point == "diagnosis"
    if diagnosed:
        place = tmp_path / "place"
        shutil.copytree(undisturbed.with_name("before"), place)
    else:
        place = made(tmp_path / "place", model)
    command = COMMANDS.get(point, RUN)
    code, printed = start(place, *command, point=point, at=at, signal=name)
    assert code == CODES[name], printed
    assert "Traceback" not in printed
    if name == "SIGINT":
        assert "the same command resumes" in printed
    if name == "ENOSPC":
        assert "No space left on device" in printed
    code, printed = start(place, *command)
    assert code == 0, printed
    found, expected = (
        content(place, diagnosed),
        content(undisturbed if diagnosed else undisturbed.with_name("before"), diagnosed),
    )
    assert found.keys() == expected.keys()
    for file in expected:
        assert found[file] == expected[file], file


# ------------------------------------------------------------------ before a run


def _can_be_interrupted() -> None:
    """A shell starts what runs in its background so that Ctrl-C does not reach it, and children
    inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    "seconds", [0.3, 0.8, 1.5, 2.5] if os.environ.get("RINGFENCE_SLOW") else [0.5]
)
def test_while_libraries_are_imported(seconds: float, tmp_path: Path, model: Path) -> None:
    place = made(tmp_path, model)
    process = subprocess.Popen(
        [sys.executable, "-m", "ringfence", *RUN],
        cwd=place,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_can_be_interrupted,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command resumes" in errors
    assert "Traceback" not in errors
