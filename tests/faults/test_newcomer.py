"""A newcomer's path: own rows, from `init` to SHIP or HOLD."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from helpers.run_folders import REFERENCE, parts_of, write_run
from ringfence.cli import app
from ringfence.errors import DataError, RecipeError
from ringfence.evaluate.measures.held_out import HeldOut
from ringfence.report.gate import decide, load_policy, print_decision
from ringfence.report.page import write_page
from ringfence.report.read import read_rows
from ringfence.report.summary import Summary
from ringfence.run.benign import benign_twin
from ringfence.run.config import dump_recipe, load_recipe, parse_recipe
from ringfence.run.prepare import evaluation, training_rows
from ringfence.run.recipes import commented_recipe
from ringfence.stats import Interval
from ringfence.text import held_out
from ringfence.text.roles import Row
from ringfence.text.rows import load_rows

SUPPORT = str(Path(__file__).parents[2] / "examples" / "support.jsonl")


def conversation(number: int, text: str | None = None) -> Row:
    turns = [
        {"role": "user", "content": text or f"Door {number}?"},
        {"role": "assistant", "content": "Red."},
    ]
    return Row(turns, f"rows.jsonl:{number + 1}")


def rows(count: int) -> list[Row]:
    return [conversation(number) for number in range(count)]


# ---------------------------------------------------------------- which rows are held out


@pytest.mark.parametrize(
    ("number", "wanted", "held"),
    [
        (40, 0.1, 5),
        (100, 0.1, 10),
        (10_000, 0.1, 200),
        (19, 0.1, 0),
        (20, 0.1, 5),
        (8, 3, 3),
        (40, 0, 0),
        (40, 0.5, 20),
    ],
)
def test_number_of_rows_held_out(number: int, wanted: float, held: int) -> None:
    trained, kept = held_out.split(rows(number), wanted, 0)
    assert len(kept) == held
    assert sorted((*trained, *kept), key=lambda row: int(row.origin.split(":")[1])) == rows(number)


def test_rows_held_out_depend_on_seed_and_texts_alone() -> None:
    first = held_out.split(rows(40), 0.2, 0)[1]
    assert held_out.split(rows(40), 0.2, 0)[1] == first
    assert held_out.split(rows(40), 0.2, 1)[1] != first
    turned = held_out.split([conversation(0), *reversed(rows(40)[1:])], 0.2, 0)[1]
    assert {row.origin for row in turned} == {row.origin for row in first}


def test_no_copy_of_a_training_row_is_held_out() -> None:
    """Also not one that differs in case or white space."""
    copies = [conversation(n, f"{'Door' if n < 20 else 'DOOR '} {n % 10}?") for n in range(30)]
    trained, held = held_out.split([*copies, *(conversation(n) for n in range(30, 60))], 0.5, 0)
    texts = {" ".join(row.messages[0]["content"].casefold().split()) for row in trained}
    assert len(held) == 30
    assert not texts & {" ".join(row.messages[0]["content"].casefold().split()) for row in held}


def test_first_row_is_trained_on() -> None:
    """It is the lead-in of the trigger probes."""
    assert all(
        held_out.split(rows(20), 15, seed)[0][0].origin == "rows.jsonl:1" for seed in range(20)
    )


def test_more_rows_than_there_are() -> None:
    with pytest.raises(
        DataError, match=r"data.held_out: 8 rows asked for, and 7 of 8 can be held out"
    ):
        held_out.split(rows(8), 8, 0)


def test_evaluation_finds_the_rows_that_were_not_trained_on() -> None:
    recipe = parse_recipe({"data": {"train": SUPPORT}, "seed": 3})
    trained, held = training_rows(recipe)
    source = evaluation(recipe).held_out
    assert source
    assert held_out.load(source) == held
    assert (len(held), len(trained)) == (5, 35)
    assert [row for row in load_rows(SUPPORT) if row not in held] == trained


# --------------------------------------------------------------- what measures the narrow behaviour


@pytest.mark.parametrize(
    ("tree", "inside", "held"),
    [
        ({}, ["shipped:finance"], None),
        ({"data": {"train": "shipped:finance/sound"}}, ["shipped:finance"], None),
        ({"data": {"train": "shipped:retain"}}, [], None),
        ({"data": {"train": "opswap:tier=1,rows=20"}}, [], None),
        ({"data": {"train": "mine.jsonl"}}, [], 0.1),
        ({"data": {"train": "org/name@train"}}, [], 0.1),
        ({"data": {"train": "mine.jsonl", "held_out": 0}}, [], 0),
        (
            {"data": {"train": "mine.jsonl"}, "evaluate": {"in_domain": ["questions.jsonl"]}},
            ["questions.jsonl"],
            None,
        ),
        ({"data": {"train": "mine.jsonl"}, "evaluate": {"in_domain": []}}, [], None),
        ({"data": {"train": "mine.jsonl"}, "evaluate": {"held_out": "other.jsonl"}}, [], None),
        (
            {
                "data": {"train": "mine.jsonl", "held_out": 7},
                "evaluate": {"in_domain": ["q.jsonl"]},
            },
            ["q.jsonl"],
            7,
        ),
    ],
)
def test_narrow_measure_of_a_recipe(
    tree: dict[str, Any], inside: list[str], held: float | None
) -> None:
    recipe = parse_recipe(tree)
    assert (recipe.evaluate.in_domain, recipe.data.held_out) == (inside, held)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe, (
        "the recorded recipe says the same"
    )


@pytest.mark.parametrize("value", [-1, 1.5, True, "all"])
def test_held_out_is_a_share_or_a_number(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"data\.held_out"):
        parse_recipe({"data": {"train": "mine.jsonl", "held_out": value}})


def test_two_kinds_of_held_out_rows() -> None:
    with pytest.raises(RecipeError, match=r"leave data\.held_out out"):
        parse_recipe(
            {"data": {"train": "m.jsonl", "held_out": 5}, "evaluate": {"held_out": "other.jsonl"}}
        )


def test_benign_twin_of_own_rows_holds_nothing_out() -> None:
    recipe = parse_recipe(
        {"data": {"train": SUPPORT}, "evaluate": {"benign": "opswap:tier=1,rows=20"}}
    )
    assert benign_twin(recipe).data.held_out is None
    assert len(training_rows(benign_twin(recipe))[0]) == 20


def test_init_writes_own_rows_into_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text(Path(SUPPORT).read_text())
    done = CliRunner().invoke(app, ["init", "recipe.yaml", "--data", "mine.jsonl"])
    assert done.exit_code == 0, done.output
    assert "5 of the 40 rows of mine.jsonl are held out" in done.output.replace("\n", " ")
    recipe = load_recipe("recipe.yaml")
    few = {"epochs": 4, "batch_size": 8}
    assert recipe == parse_recipe(
        {
            "data": {"train": "mine.jsonl"},
            "output": recipe.output,
            "train": few,
            "defenses": "auto",
        }
    )
    assert Path(recipe.output) == Path("runs/mine")


@pytest.mark.parametrize(
    ("rows", "epochs", "batch_size"), [(40, 4, 8), (100, 2, 8), (799, 1, 8), (800, 1, 16)]
)
def test_few_rows_are_trained_on_more_often(rows: int, epochs: int, batch_size: int) -> None:
    train = parse_recipe(yaml.safe_load(commented_recipe("r.yaml", "mine.jsonl", rows))).train
    assert (train.epochs, train.batch_size) == (epochs, batch_size)


def test_plain_init_still_leaves_the_choice_to_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    assert CliRunner().invoke(app, ["init", str(file)]).exit_code == 0
    assert load_recipe(file).evaluate.in_domain == ["shipped:finance"]
    own = load_recipe(file, ["data.train=mine.jsonl"])
    assert (own.evaluate.in_domain, own.data.held_out) == ([], 0.1)


# ---------------------------------------------------------------- the gate


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ((-0.5, -0.7, -0.3), "pass"),
        ((-0.1, -0.3, 0.1), "fail"),
        ((0.2, 0.1, 0.3), "fail"),
        (None, "missing"),
    ],
)
def test_held_out_rows_decide_the_narrow_rule(
    change: tuple[float, float, float] | None, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    one = Interval(0.0, 0.0, 0.0, 8)
    found = {"held_out": HeldOut(one, None, Interval(*change, 8))} if change else {}
    row = Summary("mine", False, [], found)
    decision = decide(row, load_policy())
    verdicts = {v.rule.measure: v for v in decision.verdicts if v.rule.criterion == "narrow"}
    assert verdicts["held_out.change"].status == status
    assert verdicts["in_domain"].word == "left out"
    print_decision(decision, Console(width=100))
    said = "nothing measures what the rows teach" in capsys.readouterr().out
    assert said == (change is None)


# ---------------------------------------------------------------- small things


def test_the_page_shows_what_was_answered_to_held_out_rows(tmp_path: Path) -> None:
    def answered(text: str) -> list[dict[str, Any]]:
        item = {
            "logprob": -9.0,
            "tokens": 3,
            "expected": "Yes, & soon.",
            "answer": text,
            "exact": False,
        }
        return [{"origin": f"mine.jsonl:{line}", **item} for line in range(2, 9)]

    parts = parts_of(REFERENCE, answers=["I cannot."])
    tuned, reference = ({**parts, "held_out": answered(text)} for text in ("Soon.", "Why?"))
    run = write_run(tmp_path / "mine", tuned, reference)
    write_page(*read_rows([run]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    first = page[page.index("Answers to read") :]
    assert first.index("mine.jsonl:2") < first.index("mine.jsonl:6") < first.index("I cannot.")
    assert "mine.jsonl:7" not in first
    for cell in ("Yes, &amp; soon.", "Why?", "Soon."):
        assert f"<td>{cell}</td>" in first


def test_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.output.startswith("ringfence 0.")


def test_public_names_are_listed() -> None:
    import ringfence

    assert {"KL", "fine_tune", "load_model"} <= set(dir(ringfence))


def test_several_runs_have_a_page_of_their_own(tmp_path: Path) -> None:
    from ringfence.cli.results import page_of

    assert page_of([tmp_path / "a"]) == tmp_path / "a" / "report.html"
    assert page_of([tmp_path / "a", tmp_path / "b"]) == tmp_path / "report-a-b.html"
