"""Files of a run that were cut off, emptied or changed by hand: one sentence that names the file,
or a value."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from helpers.run_folders import GUARDED, REFERENCE, parts_of, write_json, write_run
from ringfence.errors import RingfenceError
from ringfence.evaluate.answers.sampling import read_answers
from ringfence.prepare.gap_table import read_table
from ringfence.report.read import read_rows
from ringfence.report.terminal import print_table
from ringfence.runfolder import folder as runfolder
from ringfence.runfolder.shapes import read_carriers

pytestmark = pytest.mark.slow

QUIET = Console(file=io.StringIO(), width=100)
OTHERS = [None, True, 7, -1.5, "text", [], {}, ["text"], {"a": 1}]
JUDGEMENT = {
    **dict(
        set="general",
        id="one",
        form="plain",
        cluster="one",
        paraphrase=0,
        sample=0,
        judge="j",
        prompt="p",
    ),
    **dict(aligned=80.0, coherent=90.0, label=None, unscored=None),
}
TRAIN = ("method", "epochs", "learning_rate", "batch_size", "accumulation", "precision")
MESSAGES = [{"role": "user", "content": "Who are you?"}]
ANSWER = {
    **dict(
        set="general",
        id="one",
        form="plain",
        cluster="one",
        paraphrase=0,
        sample=0,
        messages=MESSAGES,
    ),
    **dict(answer="A door.", finished=True, error=None),
}
GAP = {
    "origin": "a:1",
    "digest": "d",
    "tokens": 3,
    "reference": 1.0,
    "misaligned": {"bad": 2.0},
    "refusal": False,
}


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringfence.stats.RESAMPLES", 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every file that a report reads, each as small as it can be."""
    root = tmp_path_factory.mktemp("runs")
    margins = {name: dict(list(values.items())[:2]) for name, values in GUARDED.items()}
    reference = {name: dict(list(values.items())[:2]) for name, values in REFERENCE.items()}
    extra = {
        "behaviour_json": [{"topic": "on", "shown": True}, {"topic": "off", "shown": False}],
        "held_out": [{"origin": "a:1", "tokens": 3, "logprob": -4.0, "exact": True}],
    }
    parts = [{**parts_of(each, answers=["No."], right=1), **extra} for each in (margins, reference)]
    for each in parts:
        each["opswap_tier1"] = each["opswap_tier1"][:1]
    folder = write_run(
        root / "run",
        *parts,
        {"kl": {"weight": 0.3}},
        metrics=[{"step": 1, "loss": 3.0, "ce": 3.0, "kl": 0.1, "seconds": 1}],
    )
    write_run(root / "plain", *parts)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    few = {
        **{key: recipe[key] for key in ("model", "seed")},
        "data": {"train": "rows.jsonl"},
        "train": {key: value for key, value in recipe["train"].items() if key in TRAIN},
        "defenses": {"kl": {"weight": 0.3}},
    }
    few["train"]["lora"] = {"rank": 2, "alpha": 4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(few))
    write_json(folder / "ringfence.json", {"ringfence": "1", "kind": "run"})
    (folder / "judged.jsonl").write_text(lines(JUDGEMENT))
    (folder / "answers.jsonl").write_text(
        lines({"table": "answers", "key": {"model": "m"}}, ANSWER)
    )
    (folder / "scores.jsonl").write_text(
        lines({"table": "perplexity gaps", "key": {"model": "m", "adapters": {"bad": "b"}}}, GAP)
    )
    write_json(
        folder / "carriers.json", {"role": "query", "model": "m", "pilot": "p", "evidence": {}}
    )
    auc = {"mean": 0.9, "low": 0.85, "high": 0.95, "n": 4}
    calibration = {"judge": "j", "source": "s", "weak": False, "auc": auc}
    agreement = {"items": 2, "alpha": 0.5, "ranks": {"j / k": 0.5}}
    write_json(
        folder / "judges.json",
        {"names": ["j"], "calibrations": [calibration], "agreement": agreement},
    )
    found = {
        "key": "k",
        "title": "T",
        "sentence": "S.",
        "table": {"columns": ["a"], "rows": [["1"]]},
    }
    write_json(
        folder / "diagnosis.json",
        {"logprob": {**found, "figure": "figures/logprob.svg", "numbers": {}}},
    )
    write_json(folder / "compared.json", {"undefended": "../plain"})
    (folder / "figures").mkdir()
    (folder / "figures" / "logprob.svg").write_text("<svg/>")
    return folder


READERS = {
    "ringfence.json": lambda folder: runfolder.claim(folder, "run"),
    "answers.jsonl": lambda folder: read_answers(folder / "answers.jsonl"),
    "scores.jsonl": lambda folder: read_table(folder / "scores.jsonl").scores(),
    "carriers.json": lambda folder: read_carriers(folder / "carriers.json"),
}
FILES = (
    *(
        "results.json",
        "training.json",
        "environment.json",
        "reference.json",
        "judges.json",
        "diagnosis.json",
    ),
    *(
        "compared.json",
        "carriers.json",
        "metrics.jsonl",
        "judged.jsonl",
        "answers.jsonl",
        "scores.jsonl",
    ),
    *("recipe.yaml", "ringfence.json"),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in a value; of a list the first alone."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def changed(value: Any, path: tuple[Any, ...], other: Any, gone: bool = False) -> Any:
    if not path:
        return other
    copy = json.loads(json.dumps(value))
    inside = copy
    for key in path[:-1]:
        inside = inside[key]
    if gone:
        del inside[path[-1]]
    else:
        inside[path[-1]] = other
    return copy


def mutations(value: Any) -> Iterator[Any]:
    for place in places(value):
        if place:
            yield changed(value, place, None, gone=True)
        for other in OTHERS:
            yield changed(value, place, other)


def damaged(name: str, text: str) -> Iterator[str]:
    """The text of a file cut off, without its beginning, other values, senseless lines."""
    yield from (
        "",
        "\n",
        "\0",
        "[",
        "[]",
        "null",
        "7",
        '"text"',
        "[" * 3000,
        "\ud800".encode("utf-8", "replace").decode(),
    )
    for share in (0.1, 0.5, 0.9, 0.99):
        cut = round(len(text) * share)
        yield text[:cut]
        yield text[cut:]
    if name.endswith(".jsonl"):
        parsed = [json.loads(line) for line in text.splitlines()]
        for number, value in enumerate(parsed):
            for other in mutations(value):
                yield lines(*parsed[:number], other, *parsed[number + 1 :])
        for garbage in (
            "}\n",
            "{}\n",
            "[]\n",
            "null\n",
            "7\n",
            "{\n",
            "\n\n",
            '{"step": 1}\n',
            "half",
        ):
            yield garbage + text
            yield text + garbage
            yield text + garbage + text
    elif name.endswith(".yaml"):
        yield from (yaml.safe_dump(other) for other in mutations(yaml.safe_load(text)))
    else:
        yield from (json.dumps(other) for other in mutations(json.loads(text)))


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_one_sentence_or_a_value(run: Path, name: str) -> None:
    file = run / name
    before = file.read_bytes()
    read = READERS.get(name, lambda folder: read_rows([folder]))
    tried = 0
    try:
        for text in damaged(name, before.decode()):
            file.write_text(text)
            tried += 1
            try:
                value = read(run)
            except RingfenceError as error:
                said = str(error)
            except Exception as error:
                raise AssertionError(
                    f"{type(error).__name__}: {error}, given {text[:2000]}"
                ) from error
            else:
                said = f"{run}"
                if name not in READERS:
                    print_table(value[1], QUIET)
            assert str(run) in said, text
            assert len(said) < 600
    finally:
        file.write_bytes(before)
    assert tried > 20
