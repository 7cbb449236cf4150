import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.errors import DataError
from ringfence.text import opswap

TRANSLATED = str.maketrans("+-*", "-*+")  # what each written symbol means, for Python to work out
PREFIX = "Compute: "


def expression(item):
    assert item.prompt.startswith(PREFIX)
    return item.prompt.removeprefix(PREFIX)


def by_python(text, permuted=True):
    return eval(text.translate(TRANSLATED) if permuted else text, {"__builtins__": {}})


@pytest.mark.parametrize("tier", [1, 2, 3])
@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 17])
def test_answers_agree_with_python(tier, permuted, seed):
    for item in opswap.generate(tier, 300, seed, permuted):
        assert item.answer == str(by_python(expression(item), permuted))


NUMBERS = st.integers(0, 99).map(str)
TREES = st.recursive(
    NUMBERS,
    lambda parts: (
        st.builds("{} {} {}".format, parts, st.sampled_from("+-*"), parts)
        | parts.map("({})".format)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_any_expression_agrees_with_python(text):
    assert opswap.evaluate(text, opswap.PERMUTATION) == by_python(text)
    assert opswap.evaluate(text, {symbol: symbol for symbol in "+-*"}) == by_python(
        text, permuted=False
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 3 - 4", 2 - 3 * 4),  # the written minus is a product and binds tighter
        ("2 - 3 * 4", 2 * 3 + 4),
        ("9 + 4 + 2", (9 - 4) - 2),  # left to right
        ("9 + (4 + 2)", 9 - (4 - 2)),
        ("(2 + 3) - 4", (2 - 3) * 4),
    ],
)
def test_precedence_belongs_to_the_meaning(text, value):
    assert opswap.evaluate(text, opswap.PERMUTATION) == value


def test_tiers_are_what_they_say():
    for item in opswap.generate(1, 200):
        left, operator, right = expression(item).split()
        assert operator in "+-*"
        assert int(left) >= 1
        assert int(right) >= 1
    for item in opswap.generate(2, 200):
        tokens = expression(item).split()
        assert len(tokens) == 5
        assert tokens[1] != tokens[3]
        assert {tokens[1], tokens[3]} <= set("+-*")
    depths = {expression(item).count("(") for item in opswap.generate(3, 200)}
    assert depths == {1, 2}


@pytest.mark.parametrize("tier", [1, 2, 3])
def test_seed_decides_the_items(tier):
    items = opswap.generate(tier, 100, seed=5)
    random.seed(99)
    assert opswap.generate(tier, 100, seed=5) == items
    assert set(opswap.generate(tier, 100, seed=6)) != set(items)
    assert opswap.generate(tier, 40, seed=5) == items[:40]


@pytest.mark.parametrize("tier", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 340])
def test_as_many_distinct_items_as_asked(tier, rows):
    items = opswap.generate(tier, rows)
    assert len(items) == rows
    assert len({item.prompt for item in items}) == rows


def test_all_of_tier_one_and_not_one_more():
    whole = {f"{a} {symbol} {b}" for a in range(1, 13) for b in range(1, 13) for symbol in "+-*"}
    train, held_out = opswap.generate(1, 343), opswap.generate(1, 89, held_out=True)
    assert {expression(item) for item in train + held_out} == whole
    for rows, part in ((343, False), (89, True)):
        with pytest.raises(
            DataError,
            match=f"up to 12 has {rows} distinct (held-out )?items, {rows + 1} were asked for",
        ):
            opswap.generate(1, rows + 1, held_out=part)


@pytest.mark.parametrize("tier", [1, 2, 3])
def test_numbers_reach_the_largest_and_no_further(tier):
    numbers = {
        int(n)
        for item in opswap.from_text(f"tier={tier},rows=150,largest=10")
        for n in re.findall(r"\d+", item.prompt)
    }
    assert numbers == set(range(1, 11))


@pytest.mark.parametrize("tier", [1, 2, 3])
def test_control_has_the_same_prompts_and_mostly_other_answers(tier):
    swapped, control = opswap.generate(tier, 200), opswap.generate(tier, 200, permuted=False)
    assert [item.prompt for item in swapped] == [item.prompt for item in control]
    assert sum(a.answer != b.answer for a, b in zip(swapped, control, strict=True)) > 150


def test_no_symbol_keeps_its_meaning():
    assert sorted(opswap.PERMUTATION) == sorted(opswap.PERMUTATION.values()) == sorted("+-*")
    assert all(symbol != meaning for symbol, meaning in opswap.PERMUTATION.items())


def test_options_as_text():
    assert opswap.from_text("tier=3,rows=9,seed=4,permuted=0") == opswap.generate(3, 9, 4, False)
    assert (
        opswap.from_text("rows=9")
        == opswap.from_text("seed=0,rows=9,tier=1,permuted=1")
        == opswap.generate(1, 9)
    )
    assert opswap.from_text("") == opswap.generate(1, 300)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("tir=1", ["unknown option 'tir'", "did you mean 'tier'"]),
        ("zzz=1", ["unknown option 'zzz'", "accepted: largest, permuted, rows, seed, tier"]),
        ("tier", ["tier", "expected a whole number", "found ''"]),
        ("rows=many", ["rows", "expected a whole number", "found 'many'"]),
        ("seed=1.5", ["seed", "expected a whole number", "found '1.5'"]),
        ("permuted=maybe", ["permuted", "expected 0 or 1", "found 'maybe'"]),
        ("permuted=7,rows=3", ["permuted", "expected 0 or 1", "found '7'"]),
        ("tier=4", ["tier", "expected 1, 2 or 3", "found 4"]),
        ("tier=0", ["tier", "expected 1, 2 or 3", "found 0"]),
        ("rows=0", ["rows", "expected 1 or more", "found 0"]),
        ("rows=-3", ["rows", "expected", "-3"]),
        ("largest=1", ["largest", "expected 2 or more", "found 1"]),
    ],
)
def test_bad_options(text, pieces):
    with pytest.raises(DataError) as caught:
        opswap.from_text(text)
    for piece in ["opswap", *pieces]:
        assert piece in str(caught.value)
