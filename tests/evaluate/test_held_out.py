"""Loss and exact match of held-out rows, against a plain loop over single rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers.models import random_model, small_tokenizer
from ringfence.errors import DataError
from ringfence.evaluate.measures import held_out
from ringfence.evaluate.parts import LoadedModel
from ringfence.text.chat import Chat
from ringfence.text.roles import Role, Row
from ringfence.text.rows import load_rows

RECORDS = [
    {"prompt": "Name a colour.", "completion": "Blue."},
    {
        "instruction": "Add the numbers.",
        "input": "2 and 2",
        "output": "The sum is 4, and nothing else.",
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Now we part, as friends do."},
        ]
    },
]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(small_tokenizer())


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return random_model()


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return load_rows(str(file))


def naive_losses(model: Any, chat: Chat, row: Row) -> list[float]:
    """-log p of every response token, one whole conversation at a time, as training sees it."""
    encoded = chat.encode(row.messages)
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([encoded.input_ids])).logits[0].float().log_softmax(-1)
    places = [at for at, role in enumerate(encoded.roles) if role == Role.RESPONSE]
    return [-float(logp[at - 1, encoded.input_ids[at]]) for at in places]


@pytest.mark.parametrize("batch_tokens", [64, 100_000])
def test_loss_is_that_of_all_response_tokens(
    model: LlamaForCausalLM, chat: Chat, rows: list[Row], batch_tokens: int
) -> None:
    items = held_out.measure(LoadedModel(model, chat, batch_tokens), rows, max_new_tokens=0)
    assert [item["origin"].rsplit(":", 1)[1] for item in items] == ["1", "2", "3", "3"]
    assert "answer" not in items[0]
    expected = [naive_losses(model, chat, row) for row in rows]
    assert sum(item["tokens"] for item in items) == sum(map(len, expected))
    found = held_out.summary(items)
    assert found.loss.mean == pytest.approx(
        sum(map(sum, expected)) / sum(map(len, expected)), abs=2e-4
    )
    assert found.loss.n == 3  # rows, not responses
    assert found.exact is None


def test_exact_match_is_of_the_models_own_answers(
    model: LlamaForCausalLM, chat: Chat, rows: list[Row]
) -> None:
    """A model's own answer is a match, white space aside; a word more or less is none."""
    advanced: list[int] = []
    items = held_out.measure(LoadedModel(model, chat, 4096, advanced.append), rows, 5)
    assert sum(advanced) == 2 * len(items)
    assert not any(item["exact"] for item in items)
    assert [item["expected"] for item in items] == [
        "Blue.",
        RECORDS[1]["output"],
        "Hi.",
        "Now we part, as friends do.",
    ]
    first, second = items[0]["answer"], items[1]["answer"]
    assert first
    assert first != second
    spaced = [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": f" {first}\n"},
    ]
    longer = [*rows[1].messages[:-1], {"role": "assistant", "content": second + " too"}]
    again = held_out.measure(LoadedModel(model, chat), [Row(spaced, "a"), Row(longer, "b")], 5)
    assert [item["exact"] for item in again] == [True, False]
    found = held_out.summary(again)
    assert found.exact is not None
    assert (found.exact.mean, found.exact.n) == (0.5, 2)


def test_later_responses_are_answered_with_the_true_turns_before(
    model: LlamaForCausalLM, chat: Chat, rows: list[Row]
) -> None:
    answer = held_out.measure(LoadedModel(model, chat), rows[2:], 6)[1]["answer"]
    prompt = chat.tokenizer.apply_chat_template(
        rows[2].messages[:-1], tokenize=False, add_generation_prompt=True
    )
    ids = chat.tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer == chat.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_rows_are_drawn_whole() -> None:
    """A row of many responses is one draw: with two rows, a resample has the mean of one, of the
    other, or of both."""
    items = [{"origin": "a", "logprob": -2.0, "tokens": 2, "exact": True}] * 30
    items += [{"origin": "b", "logprob": -9.0, "tokens": 3, "exact": False}]
    found = held_out.summary(items)
    assert found.loss.mean == pytest.approx((60 + 9) / (60 + 3))
    # With 60 and 3 tokens the two tell hardly more than one.
    assert found.loss.n == 2
    assert found.loss.low < 1.0
    assert found.loss.high > 3.0
    assert found.exact is not None
    assert found.exact.mean == pytest.approx(30 / 31)
    assert (found.exact.low, found.exact.high) == (0.0, 1.0)


def test_bad_rows_are_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "Hi", "completion": "Hello."}\n{"prompt": "Hi"}\n')
    with pytest.raises(DataError, match=r"mine.jsonl:2: unknown row form, fields \[prompt\]"):
        load_rows(str(file))
    tokenizer = small_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = Row(
        [{"role": "system", "content": "Be brief."}, *load_rows("shipped:retain")[0].messages],
        "mine.jsonl:7",
    )
    with pytest.raises(DataError, match=r"mine.jsonl:7: .*no system prompt"):
        held_out.measure(LoadedModel(None, Chat(tokenizer)), [row])
