"""One run, one verdict: gate, card, page and export say the same word, whatever was named when."""

import io
import json
import re

import pytest
from rich.console import Console

from helpers.run_folders import write_all
from ringfence.errors import DataError
from ringfence.report.card import run_card
from ringfence.report.export import export_runs
from ringfence.report.gate import Decision, decide_run, gate_run, load_policy, print_decision
from ringfence.report.page import write_page
from ringfence.report.read import read_rows
from ringfence.runfolder.names import COMPARED

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_drawing")]


@pytest.fixture
def folders(tmp_path):
    """Control, undefended and defended run."""
    return write_all(tmp_path)


def words(folder, policy=None):
    """The decision in the four places, from the folder alone."""
    records, rows = read_rows([folder])
    page = folder / "page.html"
    write_page(records, rows, page, policy)
    return {
        "gate": gate_run(folder, policy).word,
        "gate.json": json.loads((folder / "gate.json").read_text())["decision"],
        "card": re.search(r"\*\*(SHIP|HOLD)\*\*", run_card(folder, policy=policy))[1],
        "page": re.search(r"\b(SHIP|HOLD)\b", page.read_text().partition("<body>")[2])[1],
    }


LIMITS = {
    # An effect of 0.25 where there is a control, else a shift of 1.75.
    "effect": "{measure: values, max: 0.3}",
    "time": "{measure: time_ratio, max: 100}",  # not measured without the undefended run
}


@pytest.mark.parametrize(
    ("first", "named"),
    [
        ("gate", ()),
        ("card", ("control",)),
        ("gate", ("undefended",)),
        ("gate", ("control", "undefended")),
        ("card", ("control", "undefended")),
    ],
)
@pytest.mark.parametrize("limit", LIMITS)
def test_one_run_has_one_verdict(folders, tmp_path, named, limit, first):
    control, plain, guarded = folders
    policy = tmp_path / "policy.yaml"
    policy.write_text("rules:\n  - " + LIMITS[limit].replace("max: 0.3", "max: 0.3, bound: mean"))
    given = {role: {"control": control, "undefended": plain}[role] for role in named}
    if first == "gate":
        gate_run(guarded, policy, **given)
    else:
        run_card(guarded, policy=policy, **given)
    found = words(guarded, policy)
    assert len(set(found.values())) == 1, found
    assert found["gate"] == decide_run(guarded, policy, **given).word
    if limit == "time":
        assert found["gate"] == ("SHIP" if "undefended" in named else "HOLD")


def test_an_export_has_the_verdict_of_the_gate(folders):
    control, plain, guarded = folders
    gate = gate_run(guarded, control=control, undefended=plain)
    (decision,) = json.loads(export_runs([guarded], "json"))["decisions"]
    assert (decision["decision"], decision["compared_with"]) == (gate.word, gate.against)


def test_what_was_named_is_kept_relative_and_moves_with_the_runs(folders, tmp_path):
    control, plain, guarded = folders
    gate_run(guarded, control=control, undefended=plain)
    kept = json.loads((guarded / COMPARED).read_text())
    assert kept == {"control": f"../{control.name}", "undefended": f"../{plain.name}"}
    assert decide_run(guarded).against == f"control {control.name}, undefended run {plain.name}"


def test_a_kept_run_that_is_gone_is_a_sentence(folders):
    control, _, guarded = folders
    gate_run(guarded, control=control)
    control.rename(control.with_name("elsewhere"))
    with pytest.raises(
        DataError, match=r"its control .* kept in compared.json, is gone; name another"
    ):
        decide_run(guarded)


def test_runs_of_one_table_are_compared_with_its_undefended_run_which_the_page_says(
    folders, tmp_path
):
    control, plain, _ = folders
    records, rows = read_rows(folders, control)
    assert [(row.control, row.undefended) for row in rows][2] == (control.name, plain.name)
    write_page(records, rows, tmp_path / "page.html")
    assert (
        f"control {control.name}, undefended run {plain.name}"
        in (tmp_path / "page.html").read_text()
    )


def test_a_decision_that_cannot_be_saved_counts(folders, monkeypatch, capsys):
    from ringfence.report import gate

    (folders[1] / "gate.json").unlink(missing_ok=True)
    (folders[1] / "gate.json").mkdir()
    (folders[1] / "gate.json" / "x").write_text("")
    assert isinstance(gate.gate_run(folders[1]), Decision)
    assert "not saved" in capsys.readouterr().err


def test_a_policy_of_which_nothing_was_measured_is_shown(folders, tmp_path):
    (tmp_path / "policy.yaml").write_text(
        "rules: [{measure: opswap_tier3, min: 0.5, missing: skip}]"
    )
    text = io.StringIO()
    print_decision(decide_run(folders[1], tmp_path / "policy.yaml"), Console(file=text, width=80))
    assert "need not be: opswap_tier3" in text.getvalue()
    assert "HOLD plain: 1 rule: 0 passed, 0 failed, 1 left out" in text.getvalue()


@pytest.mark.parametrize("width", [60, *range(76, 92), 140])
def test_counts_add_up_and_words_do_not_break(folders, width):
    decision = decide_run(folders[1], control=folders[0])
    text = io.StringIO()
    print_decision(decision, Console(file=text, width=width, color_system=None))
    shown = text.getvalue()
    counts = [
        int(n)
        for n in re.search(
            r"(\d+) rules: (\d+) passed, (\d+) failed, (\d+) left out, (\d+) not", shown
        ).groups()
    ]
    assert counts[0] == sum(counts[1:]) == len(load_policy().rules)
    if width >= 80:
        for rule in load_policy().rules:
            for part in rule.measure.split("."):
                assert part in shown
