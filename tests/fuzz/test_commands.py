"""Command lines: good ones with a word changed, and lists of words. No weights are loaded, nothing
is trained."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from ringfence import cli
from ringfence.errors import RingfenceError

from .harness import knock, tries
from .mutations import TEXTS
from .places import Place, copied

pytestmark = pytest.mark.slow

GOOD = """
init new.yaml
run recipe.yaml --dry-run
run recipe.yaml output=other seed=3
run
train recipe.yaml train.epochs=2
evaluate run
evaluate run evaluate.samples=3
evaluate run/adapter --output out --reference small
evaluate name --endpoint http://127.0.0.1:9/v1 --output out
report run
report run run-benign --control run --output page.html
report run --policy policy.yaml
diagnose run
diagnose run logprob --questions 4
diagnose run/adapter erosion --base small --output out
gate run
gate run --policy policy.yaml --control run --undefended run-benign
gate --print-policy
export run
export run run-benign --format json --output all.json
card run
card run --control run --output card.md
demo --quick --output demo
show-tokens rows.jsonl --row 2 --model small
project run/adapter --base small --output projected
project small/adapter --base small --output projected --lowest 1
persona extract --pairs pairs.jsonl --model small --output v.safetensors
persona extract trait.yaml --model small --filter scores --scores scores.jsonl
persona check v.safetensors --pairs pairs.jsonl
screen rows.jsonl --model small --pairs pairs.jsonl --output s.jsonl --figure s.svg
screen rows.jsonl --vectors v.safetensors --layer 1
train-misaligned rows.jsonl --output out
score-gap rows.jsonl --adapter run --output gap.jsonl --model small
regenerate rows.jsonl --output again.jsonl --model small
patch run --output patched
patch run/adapter --output patched --until header --reference small
capability run arc --limit 2
judge calibrate --model small --on pairs.jsonl
judge calibrate --model m --on pairs.jsonl --url http://127.0.0.1:9/v1 --output c.json
schema
"""
COMMANDS = [line.split() for line in GOOD.strip().splitlines()]
OPTIONS = sorted({word for words in COMMANDS for word in words if word.startswith("--")})
WORDS = sorted({word for words in COMMANDS for word in words if not word.startswith("--")})
# An argument of a process holds no NUL, and no lone surrogate that is not half of a byte.
ODD = [text for text in TEXTS if "\0" not in text and "\ud800" not in text and len(text) < 5_000]
ODD += ["nothing.jsonl", "run/nothing", "run/results.json", "recipe.yaml/x"]
ODD += ["\udcff", "-", "--", "-1", "--help", "=", "a=b"]
ODD += ["output=.", "output=", "output=run", "data.train=small", "model=run/adapter"]
ODD += ["model=rows.jsonl", "defenses.kl={}"]


class NoWeights(Exception):
    """Stands in for the weights of a model, which no command of this test needs to see."""


@pytest.fixture(scope="module", autouse=True)
def _no_weights() -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise NoWeights("weights are not loaded here")

    async def at_once(*_: Any) -> None:
        """Between two tries of a server that is not there."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
        patch.setattr(anyio, "sleep", at_once)
        yield


@st.composite
def command_lines(draw: Any) -> list[str]:
    words = list(draw(st.sampled_from(COMMANDS)))
    odd = st.one_of(
        st.sampled_from(ODD), st.sampled_from(WORDS), st.sampled_from(OPTIONS), st.text(max_size=10)
    )
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        at = draw(st.integers(1, len(words)))
        kind = draw(st.sampled_from(["replace", "replace", "insert", "drop", "double"]))
        rest = words[at : at + 1]
        other = {
            "replace": [draw(odd)],
            "insert": [draw(odd), *rest],
            "drop": [],
            "double": rest * 2,
            "swap": rest[::-1],
        }
        words[at : at + 1] = other[kind]
    return [word.replace("\0", "") for word in words]


def run(words: list[str]) -> int:
    """The command in this process: exit code 0, 2 (with words), 3 (gate) or 130, no traceback."""
    output, errors = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["ringfence", *words]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    said = errors.getvalue()
    assert "Traceback" not in said, said
    assert code in (0, 2, 3, 130), (code, said)
    assert code != 3 or words[0] == "gate"
    said.encode()
    output.getvalue().encode("utf-8", "surrogateescape")
    if code == 2:
        assert said.strip()
        raise RingfenceError(" ".join(said.split())[:300])
    return int(code)


def test_command_lines(
    home: Path, small: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")

    @given(command_lines())
    @tries(0.1)
    def test(words: list[str]) -> None:
        folder = copied(home, place.fresh() / "home")
        copied(small, folder / "small")
        recipe = folder / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(home), str(folder)))
        here = os.getcwd()
        os.chdir(folder)
        try:
            knock("command lines", words, lambda: run(words), folder, seconds=30)
        finally:
            os.chdir(here)

    test()
