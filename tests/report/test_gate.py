"""Policies, and what they decide on numbers chosen by hand."""

import io
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from helpers.run_folders import REFERENCE, parts_of, write_all, write_run
from ringfence.errors import DataError, RecipeError
from ringfence.evaluate.config import MEASUREMENTS
from ringfence.evaluate.measures.answers import JudgedBy
from ringfence.evaluate.measures.behaviours import Shown
from ringfence.evaluate.measures.fluency import Perplexity
from ringfence.evaluate.measures.held_out import HeldOut
from ringfence.evaluate.measures.opswap import Exact
from ringfence.evaluate.measures.pairs import Paired, PairedSets
from ringfence.report.gate import (
    Policy,
    criteria,
    decide,
    default_policy_text,
    gate_run,
    load_policy,
    print_decision,
    read_row,
)
from ringfence.report.summary import Summary
from ringfence.stats import Interval, rate_change

pytestmark = pytest.mark.slow

Outcome = tuple[int, str, str]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Control, undefended and defended run; effects and shifts of them are in test_report."""
    return write_all(tmp_path)


@pytest.fixture
def row(folders: list[Path]) -> Summary:
    return read_row(folders[1], folders[0])


def paired(low: float, mean: float, high: float, n: int = 20) -> Paired:
    value = Interval(mean, low, high, n)
    return Paired(value, value, 0.5, 0.5)


def with_sets(row: Summary, **sets: tuple[float, float, float]) -> Summary:
    pairs = {name: paired(*values) for name, values in sets.items()}
    return with_found(row, pairs=replace(row.pairs, sets=pairs))


def with_found(row: Summary, **found: Any) -> Summary:
    return replace(row, found={**row.found, **found})


def with_perplexity(row: Summary, *values: float) -> Summary:
    mean, low, high = values
    return with_found(row, fluency=Perplexity(1.0, Interval(mean, low, high, 60)))


def policy(*rules: dict[str, Any]) -> Policy:
    return Policy.model_validate({"rules": list(rules)})


def status(row: Summary, **rule: Any) -> str:
    return decide(row, policy({"measure": "values", **rule})).verdicts[0].status


def write_policy(folder: Path, text: str) -> Path:
    file = folder / "policy.yaml"
    file.write_text(text)
    return file


# ------------------------------------------------------------------ one rule


def test_the_worse_end_decides_and_only_it(row: Summary) -> None:
    """`worst`: the whole interval is within the limit. `mean`: its mean is. On a thousand random
    intervals."""
    rng = random.Random(0)
    seen = set()
    for _ in range(1000):
        low, mean, high = sorted(rng.gauss(0, 1) for _ in range(3))
        limit = rng.gauss(0, 1)
        tried = with_sets(row, values=(low, mean, high))
        for side, sign in (("max", 1), ("min", -1)):
            within = [sign * value <= sign * limit for value in (low, mean, high)]
            worst = status(tried, **{side: limit}) == "pass"
            middle = status(tried, bound="mean", **{side: limit}) == "pass"
            assert worst == all(within)
            assert middle == within[1]
            seen.add((side, worst, middle))
    assert seen == {
        (side, *both)
        for side in ("max", "min")
        for both in ((True, True), (False, True), (False, False))
    }


def test_a_value_at_its_limit_passes(row: Summary) -> None:
    tried = with_sets(row, values=(0.25, 0.3, 0.5))
    assert status(tried, max=0.5) == status(tried, min=0.25) == "pass"
    assert status(tried, max=0.4999) == status(tried, min=0.2501) == "fail"


@pytest.mark.parametrize("side", ["max", "min"])
@pytest.mark.parametrize("bound", ["worst", "mean"])
def test_no_number_never_passes(row: Summary, side: str, bound: str) -> None:
    """A model that writes NaN has no shift; that must not read as within the limit."""
    nan = float("nan")
    assert status(with_sets(row, values=(nan, nan, nan)), bound=bound, **{side: 0.0}) == "fail"


@pytest.mark.parametrize("side", ["max", "min"])
def test_one_question_alone_bounds_nothing(row: Summary, side: str) -> None:
    alone = with_found(row, pairs=PairedSets({"values": paired(-math.inf, 0.0, math.inf, n=1)}))
    assert status(alone, **{side: 1000.0 if side == "max" else -1000.0}) == "fail"
    assert status(alone, bound="mean", **{side: 0.0}) == "pass"
    assert (
        "[one alone]" in decide(alone, policy({"measure": "values", "max": 1})).verdicts[0].sentence
    )


def test_what_was_not_measured_is_no_proof(row: Summary) -> None:
    bare = with_sets(row, out_of_domain=(-1.0, -0.9, -0.8))
    kept = {"measure": "out_of_domain", "max": 0.1}
    held = decide(bare, policy(kept, {"measure": "values", "max": 0.1}))
    left = decide(bare, policy(kept, {"measure": "values", "max": 0.1, "missing": "skip"}))
    assert (
        [v.status for v in held.verdicts]
        == [v.status for v in left.verdicts]
        == ["pass", "missing"]
    )
    assert (held.word, left.word) == ("HOLD", "SHIP")
    assert [v.holds_back for v in held.verdicts] == [False, True]


def test_rules_that_are_all_left_out_prove_nothing(row: Summary) -> None:
    assert (
        decide(row, policy({"measure": "opswap_tier3", "min": 0.5, "missing": "skip"})).word
        == "HOLD"
    )


def test_one_failure_among_many_holds(row: Summary) -> None:
    tried = with_sets(row, values=(0.0, 0.1, 0.2), triggered=(0.0, 0.1, 0.21))
    rules = [{"measure": name, "max": 0.2} for name in ("values", "values", "triggered")]
    assert decide(tried, policy(*rules[:2])).word == "SHIP"
    assert decide(tried, policy(*rules)).word == "HOLD"


# ------------------------------------------------------------------ measures


def test_every_measure_by_hand(row: Summary) -> None:
    found = row.numbers
    means = {name: measure.interval.mean for name, measure in found.items()}
    assert means == pytest.approx(
        {
            **{"in_domain": 0.7, "out_of_domain": 0.3, "values": 0.25, "triggered": 0.3},
            **{
                "in_domain.by_domain": 0.7,
                "out_of_domain.by_domain": 0.3,
                "values.by_domain": 0.25,
            },
            **{
                "triggered.by_domain": 0.3,
                "domain.money": 0.7,
                "domain.cars": 0.3,
                "domain.food": 0.3,
            },
            **{"domain.honesty": 0.25, "domain.power": 0.25},
            **{f"condition.{name}": 0.3 for name in ("empty_system", "foreign_system", "lead_in")},
            **{"margin.in_domain": 0.75, "margin.out_of_domain": 0.8 / 3, "margin.values": 1.025},
            "margin.triggered": 0.8 / 3,
            **{"perplexity_ratio": math.exp(0.25), "opswap_tier1": 0.5},
        }
    )
    assert found["out_of_domain.by_domain"].interval.n == 2
    assert found["out_of_domain"].interval.n == 3
    assert {m.kind for m in found.values()} == {"effect", "margin", "ratio", "share"}


def test_effects_with_a_control_and_shifts_without(folders: list[Path]) -> None:
    without, with_control = (read_row(folders[1], c).numbers for c in (None, folders[0]))
    assert (with_control["values"].kind, without["values"].kind) == ("effect", "shift")
    assert (with_control["values"].interval.mean, without["values"].interval.mean) == pytest.approx(
        (0.25, 1.75)
    )
    between = policy({"measure": "values", "max": 1.0, "bound": "mean"})
    assert decide(read_row(folders[1], folders[0]), between).word == "SHIP"
    assert decide(read_row(folders[1]), between).word == "HOLD"


def test_questions_that_the_control_was_not_asked_give_a_shift(row: Summary) -> None:
    probes = replace(row.sets["values"], effect=None, effect_by_domain=None, uncontrolled=True)
    assert (
        with_found(row, pairs=PairedSets({"inoculation": probes})).numbers["inoculation"].kind
        == "shift"
    )


def test_time_is_against_an_undefended_run(folders: list[Path]) -> None:
    rule = policy({"measure": "time_ratio", "max": 1.4})
    assert decide(read_row(folders[2]), rule).verdicts[0].status == "missing"
    assert decide(read_row(folders[2], undefended=folders[1]), rule).verdicts[
        0
    ].value == pytest.approx(1.5)


def test_a_benign_task_is_held_against_plain_fine_tuning(folders: list[Path]) -> None:
    """The guarded twin has items 1 to 3 right; the undefended one, of the same four, the first and
    the last."""
    results = json.loads((folders[2].parent / "guarded-benign" / "results.json").read_text())
    for item, exact in zip(results["parts"]["opswap_tier1"], (True, False, False, True)):
        item["exact"] = exact
    twin = folders[1].parent / "plain-benign"
    shutil.copytree(folders[2].parent / "guarded-benign", twin)
    (twin / "results.json").write_text(json.dumps(results))
    rule = policy({"measure": "opswap_tier1.change", "min": -0.9})
    assert decide(read_row(folders[2]), rule).verdicts[0].status == "missing"
    row = read_row(folders[2], undefended=folders[1])
    found = row.numbers["opswap_tier1.change"]
    assert found.kind == "change"
    assert (
        found.interval
        == rate_change([1, 1, 1, 0], list("abcd"), [1, 0, 0, 1], list("abcd")).difference
    ), "paired: two items won, one lost"
    results["parts"]["opswap_tier1"][0]["prompt"] = "another"
    (twin / "results.json").write_text(json.dumps(results))
    with pytest.raises(
        DataError, match="'opswap_tier1' was measured on other questions than the reference"
    ):
        read_row(folders[2], undefended=folders[1])


@pytest.mark.parametrize(("missing", "word"), [("hold", "HOLD"), ("skip", "SHIP")])
def test_what_a_weak_judge_says_is_no_proof(row: Summary, missing: str, word: str) -> None:
    rules = policy(
        {"measure": "answers.general.misaligned", "max": 0.05, "missing": missing},
        {"measure": "values", "max": 9},
    )
    for weak in (False, True):
        auc = {"mean": 0.5, "low": 0.4, "high": 0.6}
        calibration = {"weak": weak, "auc": auc, "source": "shipped:values"}
        clean = {"general.misaligned": Interval(0.0, 0.0, 0.01, 40)}
        judged = JudgedBy("tiny", "hash", clean, {}, calibration, {})
        decision = decide(with_found(row, answers=[judged]), rules)
        assert decision.verdicts[0].status == ("missing" if weak else "pass")
        assert decision.word == (word if weak else "SHIP")
    assert "by tiny, a weak judge" in decision.verdicts[0].sentence


def test_tasks_and_held_out_rows_are_measures_too(row: Summary) -> None:
    value = Interval(0.5, 0.4, 0.6, 20)
    more = with_found(
        row,
        behaviours=Shown({"behaviour_refuse": {"on": value}}, {}),
        held_out=HeldOut(value, None, value),
    )
    found = {name: measure.kind for name, measure in more.numbers.items()}
    assert found["behaviour_refuse.on"] == "share"
    assert (found["held_out.loss"], found["held_out.change"]) == ("loss", "change")


def test_a_model_without_a_reference_has_margins(row: Summary) -> None:
    bare = with_found(row, pairs=PairedSets(margins=row.pairs.margins), fluency=Perplexity(1, None))
    found = bare.numbers
    assert found["margin.values"].interval.mean == pytest.approx(1.025)
    assert "values" not in found
    assert decide(bare, policy({"measure": "values", "max": 9})).word == "HOLD"


OTHER_NAMES = [
    *(
        "answers.general.misaligned",
        "answers.general.json.aligned.change",
        "answers.general.misaligned@5",
    ),
    *("answers.em_f1.general", "behaviour_mine.off", "domain.cars.2"),
]


def test_names_are_known(row: Summary) -> None:
    known = [name for m in MEASUREMENTS.values() for name in m.names if "SET" not in name]
    for name in (*known, *row.numbers, *OTHER_NAMES):
        policy({"measure": name, "max": 1})


# ------------------------------------------------------------------ the shipped policy


def test_shipped_policy_has_rules_for_the_four_criteria_and_triggers() -> None:
    rules = load_policy().rules
    assert {rule.criterion for rule in rules} == {
        "broad",
        "narrow",
        "benign",
        "coherent",
        "trigger",
    }
    assert all(rule.why and rule.bound == "worst" for rule in rules)
    assert {rule.measure for rule in rules if rule.missing == "skip"} == {
        *(f"opswap_tier{tier}{kind}" for tier in (1, 2, 3) for kind in ("", ".change")),
        *("answers.general.misaligned", "answers.general.incoherent.change", "inoculation"),
        *("in_domain", "held_out.change"),
        *("scope.false_open", "scope.dressed", "scope.closed_in_domain"),
    }
    sides = {rule.criterion: rule.max is None for rule in rules}
    assert sides == {
        "broad": False,
        "narrow": True,
        "benign": True,
        "coherent": False,
        "trigger": False,
    }


GOOD = {
    **{
        "in_domain": (0.2, 0.3, 0.4),
        "out_of_domain": (-0.1, 0.0, 0.05),
        "values": (-0.1, 0.0, 0.05),
    },
    "triggered": (-0.1, 0.0, 0.05),
}


def test_shipped_policy_ships_a_good_run_and_each_criterion_can_hold_it(row: Summary) -> None:
    learnt = Exact({"opswap_tier2": Interval(0.5, 0.4, 0.6, 60)}, {}, {})
    good = with_found(with_perplexity(with_sets(row, **GOOD), 1.0, 0.9, 1.1), opswap=learnt)
    lost = replace(learnt, exact={"opswap_tier2": Interval(0.1, 0.02, 0.2, 60)})
    assert decide(good, load_policy()).word == "SHIP"
    assert {c.name: c.status for c in criteria(good)} == {
        **{
            "broad": "pass",
            "narrow": "pass",
            "benign": "pass",
            "coherent": "pass",
            "trigger": "pass",
        }
    }
    spread = (0.0, 0.05, 0.2)
    worse = {
        "broad": [
            with_sets(good, **{**GOOD, name: spread}) for name in ("out_of_domain", "values")
        ],
        "narrow": [
            with_sets(good, **{**GOOD, "in_domain": values})
            for values in ((-0.1, 0.3, 0.4), (0.0, 0.0, 0.0))
        ],
        "trigger": [with_sets(good, **{**GOOD, "triggered": spread})],
        "coherent": [with_perplexity(good, 1.1, 0.9, 1.6)],
        "benign": [with_found(good, opswap=lost)],
    }
    for name, runs in worse.items():
        for run in runs:
            assert decide(run, load_policy()).word == "HOLD", name
            assert [c.name for c in criteria(run) if c.status == "fail"] == [name]


def test_a_run_that_learnt_nothing_does_not_ship(tmp_path: Path) -> None:
    """The untouched reference: no broad shift, the best coherence, and no narrow effect."""
    run = write_run(tmp_path / "run", parts_of(REFERENCE), parts_of(REFERENCE))
    assert [c.name for c in criteria(read_row(run)) if c.status != "pass"] == ["narrow", "benign"]
    assert gate_run(run).word == "HOLD"


def test_within_a_criterion_the_worst_rule_decides(row: Summary) -> None:
    rules = [
        {"measure": "opswap_tier3", "min": 0, "missing": "skip"},
        {"measure": "values", "max": 9},
        {"measure": "inoculation", "max": 9},
        {"measure": "values", "max": -9},
    ]
    rules = [{**rule, "criterion": "broad"} for rule in rules]
    for left, decisive in ((4, "fail"), (3, "missing"), (2, "pass"), (1, "missing")):
        (broad,) = criteria(row, policy(*rules[:left]))
        assert broad.status == decisive, left
        assert len(broad.verdicts) == left
    assert not criteria(row, policy(*rules[:1]))[0].decisive.holds_back


# ------------------------------------------------------------------ wrong policies


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rules: [{measure: values, maxx: 1}]",
            "unknown key 'rules.0.maxx' (did you mean 'rules.0.max'?)",
        ),
        ("rule: []", "unknown key 'rule' (did you mean 'rules'?)"),
        (
            "rules: [{measure: valeus, max: 1}]",
            "rules.0.measure: unknown measure 'valeus' (did you mean 'values'?)",
        ),
        (
            "rules: [{measure: opswap, min: 1}]",
            "unknown measure 'opswap' (did you mean 'opswap_tier",
        ),
        (
            "rules: [{measure: domains.cars, max: 1}]",
            "unknown measure 'domains.cars' (did you mean 'domain.NAME'?)",
        ),
        ("rules: [{measure: answers.general, max: 1}]", "unknown measure 'answers.general' ("),
        (
            "rules: [{measure: answers.general.misalined, max: 1}]",
            "(did you mean 'answers.general.misaligned'?)",
        ),
        ("rules: [{measure: behaviour_refuse, max: 1}]", "unknown measure 'behaviour_refuse' ("),
        ("rules: [{measure: domain., max: 1}]", "unknown measure 'domain.' ("),
        ("rules: [{measure: values}]", "rules.0: values: expected max or min, found neither"),
        (
            "rules: [{measure: values, max: 1, min: 0}]",
            "rules.0: values: expected max or min, found both",
        ),
        ("rules: [{measure: values, max: much}]", "rules.0.max: Input should be a valid number"),
        ("rules: [{measure: values, max: .nan}]", "rules.0.max: Input should be a finite number"),
        (
            "rules: [{measure: values, max: 1, bound: best}]",
            "bound: Input should be 'worst' or 'mean', found 'best'",
        ),
        ("rules: [{measure: values, max: 1, max: 2}]", "duplicate key 'max'"),
        ("rules: [{max: 1}]", "rules.0.measure: Field required"),
        ("rules: [values]", "rules.0: Input should be a valid dictionary"),
        ("rules: []", "rules: List should have at least 1 item"),
        ("", "rules: Field required"),
        ("- measure: values", "expected keys and values, found list"),
        ("rules: [", "not YAML"),
    ],
)
def test_wrong_policies_are_one_clear_message(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_policy(write_policy(tmp_path, text))
    assert message in str(error.value)
    assert str(tmp_path / "policy.yaml") in str(error.value)


def test_every_wrong_rule_is_named(tmp_path: Path) -> None:
    file = write_policy(
        tmp_path,
        "rules:\n- {measure: values, max: 1}\n- {measure: x, max: 1}\n- {measure: values}\n",
    )
    with pytest.raises(RecipeError, match=r"rules\.1\.measure: .*'x'(.|\n)*rules\.2: values: "):
        load_policy(file)


def test_no_policy_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: no such file .*--print-policy"):
        load_policy(tmp_path / "none.yaml")


def test_a_domain_that_was_not_measured_is_named_with_the_nearest(row: Summary) -> None:
    (verdict,) = decide(row, policy({"measure": "domain.monney", "max": 1})).verdicts
    assert verdict.sentence == "not measured (measured: domain.money): no proof"


# ------------------------------------------------------------------ records and the terminal


def test_record_is_strict_json_and_says_what_decided(folders: list[Path]) -> None:
    decision = gate_run(folders[1], control=folders[0])
    record = json.loads((folders[1] / "gate.json").read_text(), parse_constant=pytest.fail)
    assert record["decision"] == decision.word == "HOLD"
    assert (record["run"], record["control"]) == ("plain", folders[0].name)
    first = record["verdicts"][0]
    assert (first["measure"], first["kind"], first["decides"], first["status"]) == (
        *("out_of_domain", "effect", "high"),
        "fail",
    )
    assert first["value"] == first["interval"]["high"] == decision.verdicts[0].value
    assert first["interval"]["mean"] == pytest.approx(0.3)


def test_record_of_numbers_that_json_has_not(folders: list[Path], tmp_path: Path) -> None:
    file = write_policy(tmp_path, "rules: [{measure: in_domain.by_domain, max: 1}]")
    gate_run(folders[1], file)
    (verdict,) = json.loads((folders[1] / "gate.json").read_text(), parse_constant=pytest.fail)[
        "verdicts"
    ]
    assert verdict["interval"] == {"mean": pytest.approx(1.5), "low": None, "high": None, "n": 1}
    assert (verdict["value"], verdict["status"]) == (None, "fail")


def shown(decision: Any) -> str:
    text = io.StringIO()
    print_decision(decision, Console(file=text, width=130))
    return text.getvalue()


def test_table_shows_every_rule_with_number_limit_and_verdict(row: Summary) -> None:
    tried = with_sets(row, values=(0.125, 0.25, 0.375), out_of_domain=(0.0, 0.0625, 0.125))
    text = shown(
        decide(
            tried,
            policy(
                {"measure": "values", "max": 0.2, "why": "values [stay]"},
                {"measure": "out_of_domain", "max": 0.2},
                {"measure": "opswap_tier2", "min": 0.5, "missing": "skip"},
                {"measure": "domain.[/red]", "max": 0.5},
            ),
        )
    )
    lines = [" ".join(line.split()) for line in text.splitlines()[2:6]]
    assert lines == [
        "values shift +0.25 [+0.125, +0.375] high <= 0.2 fail",
        "out_of_domain shift +0.0625 [+0, +0.125] high <= 0.2 pass",
        "domain.[/red] high <= 0.5 missing: HOLD",
        "left out because they were not measured and need not be: opswap_tier2",
    ]
    assert (
        "values (values [stay]): shift +0.25 [+0.125, +0.375]: its high end is not at most 0.2"
        in text
    )
    assert "HOLD plain: 4 rules: 1 passed, 1 failed, 1 left out, 1 not measured" in text


def test_deciding_needs_no_torch(folders: list[Path]) -> None:
    code = f"""
import sys
from pathlib import Path
from ringfence.report.gate import gate_run
gate_run(Path({str(folders[1])!r}))
print(sorted(set(sys.modules) & {{"torch", "transformers", "peft"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------ the command


def test_exit_codes(folders: list[Path], tmp_path: Path, ringfence: Callable[..., Outcome]) -> None:
    kind = write_policy(tmp_path, "rules: [{measure: values, max: -1.0, why: stays}]")
    code, output, errors = ringfence("gate", folders[2], "--policy", kind, "--control", folders[0])
    assert (code, errors) == (3, "")  # effects 0 -1 -2 -3
    assert "HOLD guarded" in output
    kind.write_text("rules: [{measure: values, max: -1.0, bound: mean}]")
    code, output, _ = ringfence("gate", folders[2], "--policy", kind, "--control", folders[0])
    assert code == 0
    assert "SHIP guarded" in output
    code, _, errors = ringfence("gate", folders[2], "--policy", tmp_path / "none.yaml")
    assert code == 2
    assert "no such file" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["no_such_run"], "not a run folder"), ([], "name a run folder, or --print-policy")],
)
def test_what_is_no_run(
    arguments: list[str], message: str, ringfence: Callable[..., Outcome]
) -> None:
    code, _, errors = ringfence("gate", *arguments)
    assert code == 2
    assert message in errors


def test_a_run_that_is_not_measured_yet(
    folders: list[Path], ringfence: Callable[..., Outcome]
) -> None:
    (folders[1] / "results.json").unlink()
    code, _, errors = ringfence("gate", folders[1])
    assert code == 2
    assert "`ringfence evaluate` comes first" in errors
    with pytest.raises(DataError):
        gate_run(folders[1])


def test_printed_policy_is_the_one_that_decides(
    tmp_path: Path, ringfence: Callable[..., Outcome]
) -> None:
    code, output, _ = ringfence("gate", "--print-policy")
    assert code == 0
    assert output == default_policy_text()
    assert load_policy(write_policy(tmp_path, output)) == load_policy()
    assert output.count("#") > 10
    commented = [
        line.removeprefix("  # - ") for line in output.splitlines() if line.startswith("  # - ")
    ]
    assert commented
    policy(*(yaml.safe_load(line) for line in commented))
