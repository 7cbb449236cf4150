"""What the fuzz tests found, with the smallest input of each."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from helpers.models import small_tokenizer
from ringfence.errors import LONGEST_LINE, MOST_LINES, DataError, ModelError, RingfenceError
from ringfence.evaluate.answers.framing import LABELS, JudgePrompt
from ringfence.evaluate.answers.judge import ScoreCache
from ringfence.evaluate.answers.replies import Reply
from ringfence.evaluate.answers.scores import Score, read_reply
from ringfence.model.checked import read_index
from ringfence.model.loading import load_model
from ringfence.model.prefix import read_frozen_prefix, read_stored_prefix
from ringfence.prepare.gap_table import read_table
from ringfence.prepare.persona import shown_by_scores
from ringfence.prepare.traits import load_trait
from ringfence.text.chat import Chat

from .harness import check_message
from .places import Named


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "\ufeff", "\ud800", "\u202e", "x" * 10_000, "a\n" * 100]
)
def test_messages_are_short_and_print(text: str) -> None:
    shown = str(DataError(f"rows.jsonl:1: found {text}, expected a text"))
    check_message(shown, ["rows.jsonl:1"])
    assert max(map(len, shown.split("\n"))) <= LONGEST_LINE
    assert len(shown.split("\n")) <= MOST_LINES
    assert str(DataError("a: b\nc: é")) == "a: b\nc: é"


@pytest.mark.parametrize(
    "content", [b"[" * 3_000, b"\xff", b"9" * 5_000, b'{"trait": 1, "trait": 2}']
)
@pytest.mark.parametrize("name", ["trait.json", "trait.yaml"])
def test_traits(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        load_trait(str(tmp_path / name))


@pytest.mark.parametrize("content", [b"\xb7", b"9" * 5_000, b'{"id": 1, "id": 2}'])
def test_scores_of_pairs(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "scores.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"scores\.jsonl"):
        shown_by_scores(tmp_path / "scores.jsonl", [])


@pytest.mark.parametrize(
    "content",
    [b'""', b"2", b"", b"\xff", b"{}", b'{"header": [[]], "until": "query"}', b"[" * 3_000],
)
def test_prefixes(content: bytes, tmp_path: Path) -> None:
    for name, read in (
        ("frozen_prefix.json", read_frozen_prefix),
        ("reference_prefix.json", read_stored_prefix),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read(str(tmp_path))


HEADER = {"table": "perplexity gaps", "key": {"model": "m", "adapters": {"a": "x"}}}
LINE = {"digest": "d", "reference": 1.0, "misaligned": {"a": 2.0}, "refusal": False}


@pytest.mark.parametrize(
    ("header", "line"),
    [
        (HEADER, {**LINE, "reference": -1.0}),
        (HEADER, {**LINE, "misaligned": {}}),
        (HEADER, {"digest": "d"}),
        ({**HEADER, "key": {"model": "m", "adapters": None}}, LINE),
        ({"table": "perplexity gaps"}, LINE),
    ],
)
def test_tables_of_scores(header: Any, line: Any, tmp_path: Path) -> None:
    file = tmp_path / "gap.jsonl"
    file.write_text(f"{json.dumps(HEADER)}\n{json.dumps(LINE)}\n")
    assert read_table(file).scores() == {"d": 0.5}
    file.write_text(f"{json.dumps(header)}\n{json.dumps(line)}\n")
    with pytest.raises(DataError, match=r"gap\.jsonl:[12]: "):
        read_table(file)


@pytest.mark.parametrize(
    "stored", ['""', "", "{", "{}", '{"value": 1e267}', '{"valeu": 5}', '{"label": []}']
)
def test_a_damaged_score_is_asked_again(stored: str, tmp_path: Path) -> None:
    cache, prompt = ScoreCache(tmp_path / "scores.sqlite"), JudgePrompt("How good?", LABELS)
    judge: Any = Named()
    cache.put(judge, {prompt: Score(50.0, adapted=("seed",))})
    assert cache.get(judge, prompt) == Score(50.0, adapted=("seed",))
    cache._table.execute("UPDATE scores SET score = ?", (stored,))
    assert cache.get(judge, prompt) is None
    cache.put(judge, {prompt: Score(60.0)})
    assert cache.get(judge, prompt) == Score(60.0)


def test_a_score_of_a_later_version_is_read(tmp_path: Path) -> None:
    cache, prompt = ScoreCache(tmp_path / "scores.sqlite"), JudgePrompt("How good?", LABELS)
    judge: Any = Named()
    cache.put(judge, {prompt: Score(50.0)})
    cache._table.execute("UPDATE scores SET score = ?", ('{"value": 5, "new": 1}',))
    assert cache.get(judge, prompt) == Score(5.0)


@pytest.mark.parametrize("kind", [{}, [], None, 5])
def test_model_types(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match=r"config\.json: model_type: expected .* found"):
        load_model(str(tmp_path), "fp32")


@pytest.mark.parametrize("name", ["x" * 3_000, "é" * 200, "a/b", "../w", "a\0b", "", 5])
def test_shards(name: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors.index.json"
    named = f"{name}.safetensors" if isinstance(name, str) else name
    file.write_text(json.dumps({"weight_map": {"lm_head.weight": named}}))
    with pytest.raises(
        ModelError, match="accepted: a safetensors file of the same folder"
    ) as caught:
        read_index(file)
    check_message(str(caught.value), ["index.json"])


@pytest.mark.parametrize(
    "text", ["{% break %}", "{% continue %}", "{% if true %}{% break %}{% endif %}"]
)
def test_loop_controls_outside_a_loop(text: str) -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = text + tokenizer.chat_template
    with pytest.raises(RingfenceError, match=r"outside loop|not properly in loop"):
        Chat(tokenizer)


def test_a_damaged_cache_of_scores_is_refused(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores.sqlite")
    cache._table = sqlite3.connect(":memory:")
    with pytest.raises(RingfenceError, match=r"scores\.sqlite.*damaged"):
        cache.get(Named(), JudgePrompt("How good?", LABELS))  # type: ignore[arg-type]


def test_a_reply_whose_alternatives_are_empty_counts_as_said() -> None:
    assert read_reply(Reply("85", True, [{}]), LABELS).value == 85
