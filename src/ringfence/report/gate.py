"""SHIP or HOLD: the numbers of a run against the limits of a policy. Reads records only, never
imports torch."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import DataError, nearest
from ..evaluate.config import MEASUREMENTS
from ..evaluate.measures.base import Criterion, Measurement, Number
from ..runfolder.names import GATE
from ..stats import finite
from ..util.strict_yaml import Real, read_mapping, validate
from .compared import keep, keep_compared
from .read import read_rows
from .summary import Summary

HOLD = 3  # exit code
DEFAULT_POLICY = resources.files("ringfence") / "shipped" / "policy.yaml"
Status = Literal["pass", "fail", "missing"]
UNMEASURED: dict[Criterion, str] = {
    "broad": "nothing measures other domains",
    "narrow": "nothing measures what the rows teach",
    "benign": "nothing measures whether a harmless task is still learnt",
    "coherent": "nothing measures whether answers stay coherent",
    "trigger": "nothing measures the answers to disguised prompts",
}


class Rule(BaseModel):
    """A limit on one measure."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    measure: str = Field(description="name of what is limited, see docs/gate.md")
    max: Real | None = Field(None, ge=-1e9, le=1e9, description="it may be at most this")
    min: Real | None = Field(None, ge=-1e9, le=1e9, description="it must be at least this")
    bound: Literal["worst", "mean"] = Field(
        "worst",
        description="worst: the worse end of the 95 % interval decides; mean: the mean does",
    )
    missing: Literal["hold", "skip"] = Field(
        "hold", description="hold: a missing measure holds the run; skip: the rule is left out"
    )
    criterion: Criterion | None = Field(
        None, description="the criterion that the rule belongs to; default: that of its measurement"
    )
    why: str = Field("", description="shown with the verdict")

    @field_validator("measure")
    @classmethod
    def _known(cls, name: str) -> str:
        _owner(name)
        return name

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        self.criterion = self.criterion or _owner(self.measure).criterion(self.measure)
        if (self.max is None) == (self.min is None):
            found = "neither" if self.max is None else "both"
            raise ValueError(f"{self.measure}: expected max or min, found {found}")
        return self

    @property
    def limit(self) -> str:
        """`at most 0.1`"""
        return f"at least {self.min:g}" if self.max is None else f"at most {self.max:g}"

    @property
    def decides(self) -> Literal["mean", "low", "high"]:
        """Which number of an interval is compared with the limit."""
        if self.bound == "mean":
            return "mean"
        return "low" if self.max is None else "high"

    def allows(self, value: float) -> bool:
        """Written so that NaN is not allowed."""
        return (self.max is None or value <= self.max) and (self.min is None or value >= self.min)


def _owner(name: str) -> Measurement:
    """The measurement that gives numbers of this name."""
    for measurement in MEASUREMENTS.values():
        if measurement.knows(name):
            return measurement
    known = [like for measurement in MEASUREMENTS.values() for like in measurement.like(name)]
    raise ValueError(f"unknown measure {name!r}{nearest(name, known)}")


class Policy(BaseModel):
    """The rules that must all hold."""

    model_config = ConfigDict(extra="forbid")

    rules: list[Rule] = Field(min_length=1)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one rule; `value` is the number that decides, None where there is no proof
    either way."""

    rule: Rule
    measure: Number | None
    value: float | None
    status: Status
    sentence: str

    @property
    def holds_back(self) -> bool:
        """Whether it makes the decision HOLD."""
        return self.status == "fail" or (self.status == "missing" and self.rule.missing == "hold")

    @property
    def word(self) -> str:
        return "left out" if self.status == "missing" and not self.holds_back else self.status

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.rule.model_dump(),
            "status": self.status,
            "holds_back": self.holds_back,
            "decides": self.rule.decides,
            "value": self.value,
            "kind": self.measure.kind if self.measure else None,
            "judge": self.measure.judge if self.measure else None,
            "interval": self.measure.interval.to_dict() if self.measure else None,
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class Decision:
    """SHIP only when no rule holds back and at least one has passed."""

    run: str
    verdicts: list[Verdict]
    control: str | None = None
    undefended: str | None = None
    policy: str | None = None  # digest
    seeds: int = 1

    @property
    def counts(self) -> str:
        """`14 rules: 2 passed, 1 failed, 9 left out, 2 not measured`"""
        failed = sum(verdict.status == "fail" for verdict in self.verdicts)
        unmeasured = sum(v.status == "missing" and v.holds_back for v in self.verdicts)
        left_out = len(self.verdicts) - self.passed - failed - unmeasured
        rules = "1 rule" if len(self.verdicts) == 1 else f"{len(self.verdicts)} rules"
        return (
            f"{rules}: {self.passed} passed, {failed} failed, {left_out} left out, "
            f"{unmeasured} not measured"
        )

    @property
    def against(self) -> str:
        """What the run was compared with, in words."""
        control = f"control {self.control}" if self.control else "no control"
        undefended = f"undefended run {self.undefended}" if self.undefended else "no undefended run"
        return f"{control}, {undefended}"

    @property
    def passed(self) -> int:
        return sum(verdict.status == "pass" for verdict in self.verdicts)

    @property
    def ship(self) -> bool:
        return self.passed > 0 and not any(verdict.holds_back for verdict in self.verdicts)

    @property
    def word(self) -> Literal["SHIP", "HOLD"]:
        return "SHIP" if self.ship else "HOLD"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite (the interval of a single question) become null."""
        compared = {
            "control": self.control,
            "undefended": self.undefended,
            "policy": self.policy,
            "seeds": self.seeds,
        }
        verdicts = [verdict.to_dict() for verdict in self.verdicts]
        return finite({"decision": self.word, "run": self.run, **compared, "verdicts": verdicts})


@dataclass(frozen=True)
class CriterionVerdict:
    """One criterion and its rules, the worst first: failed, not measured, passed, left out. The
    first one decides."""

    name: Criterion
    verdicts: list[Verdict]

    @property
    def decisive(self) -> Verdict:
        return self.verdicts[0]

    @property
    def status(self) -> Status:
        return self.decisive.status

    @property
    def sentence(self) -> str:
        """The deciding number; if no rule was measured, that nothing measures the criterion."""
        if self.decisive.word == "left out":
            return UNMEASURED[self.name]
        return f"{self.decisive.rule.measure.replace('_', ' ')}: {self.decisive.sentence}"


# ------------------------------------------------------------------ policies


def load_policy(file: Path | None = None) -> Policy:
    """The policy of a YAML file, or the shipped one.

    Raises:
        RecipeError: no such file, not YAML, an unknown key or measure (with the nearest name), a
            rule without a limit.
    """
    with resources.as_file(DEFAULT_POLICY) as shipped:
        tree = read_mapping(file or shipped, "`ringfence gate --print-policy` prints one")
    return validate(Policy, tree, str(file or "policy"))


def default_policy_text() -> str:
    """The shipped policy, with its comments."""
    return DEFAULT_POLICY.read_text("utf-8")


# ------------------------------------------------------------------ deciding


def decide(row: Summary, policy: Policy) -> Decision:
    """Every rule of a policy against the numbers of a run."""
    found = row.numbers
    verdicts = [_judge(rule, found) for rule in policy.rules]
    return Decision(row.name, verdicts, row.control, row.undefended, _digest(policy), row.seeds)


def _digest(policy: Policy) -> str:
    return hashlib.sha256(policy.model_dump_json().encode()).hexdigest()[:16]


def criteria(row: Summary, policy: Policy | None = None) -> list[CriterionVerdict]:
    """The criteria for which a policy (default: the shipped one) has rules, in their order."""
    return by_criterion(decide(row, policy or load_policy()))


def by_criterion(decision: Decision) -> list[CriterionVerdict]:
    """The verdicts of a decision, criterion by criterion."""
    verdicts = sorted(decision.verdicts, key=_worst_first)
    by_name = {
        name: [v for v in verdicts if v.rule.criterion == name] for name in get_args(Criterion)
    }
    return [CriterionVerdict(name, own) for name, own in by_name.items() if own]


def _worst_first(verdict: Verdict) -> int:
    if verdict.status == "missing":
        return 1 if verdict.holds_back else 3
    return 0 if verdict.status == "fail" else 2


def _judge(rule: Rule, found: dict[str, Number]) -> Verdict:
    measure = found.get(rule.measure)
    if measure is None or measure.weak:
        fate = "no proof" if rule.missing == "hold" else "the rule is left out"
        close = get_close_matches(rule.measure, found, n=1, cutoff=0.8)
        why = f"not measured (measured: {close[0]})" if close else "not measured"
        if measure:
            why = f"{measure} by {measure.judge}, a weak judge"
        return Verdict(rule, measure, None, "missing", f"{why}: {fate}")
    value = getattr(measure.interval, rule.decides)
    allowed = rule.allows(value)
    end = "mean" if rule.decides == "mean" else f"{rule.decides} end"
    sentence = f"{measure.kind} {measure}: its {end} is {'' if allowed else 'not '}{rule.limit}"
    return Verdict(rule, measure, value, "pass" if allowed else "fail", sentence)


# ------------------------------------------------------------------ a run folder


def gate_run(
    folder: Path,
    policy: Path | None = None,
    control: Path | None = None,
    undefended: Path | None = None,
    seeds: Sequence[Path] = (),
) -> Decision:
    """Decides on a run folder, and writes `gate.json` there.

    Args:
        policy: YAML; default: the shipped policy.
        control: the run trained on the aligned answers; with it the limits are on effects,
            without it on shifts.
        undefended: the undefended run, for `opswap_tierN.change` and `time_ratio`. Both are kept in
            the folder, and are the default of every later command.
        seeds: more runs of the same recipe, with other seeds; the intervals are then over seeds and
            questions.

    Raises:
        RecipeError: the policy cannot be used.
        DataError: a folder holds no run, or one that is not measured.
    """
    decision = decide_run(folder, policy, control, undefended, seeds)
    keep_compared(folder, control, undefended)
    keep(folder / GATE, json.dumps(decision.to_dict(), indent=1, allow_nan=False) + "\n")
    return decision


def decide_run(
    folder: Path,
    policy: Path | None = None,
    control: Path | None = None,
    undefended: Path | None = None,
    seeds: Sequence[Path] = (),
) -> Decision:
    """The decision on a run folder, the same for every command; arguments as for `gate_run`."""
    rules = load_policy(policy)
    return decide(read_row(folder, control, undefended, seeds), rules)


def read_row(
    folder: Path,
    control: Path | None = None,
    undefended: Path | None = None,
    seeds: Sequence[Path] = (),
) -> Summary:
    """The numbers of one run folder; arguments as for `gate_run`.

    Raises:
        DataError: `seeds` are not runs of the same recipe, each with a seed of its own.
    """
    records, rows = read_rows([folder, *seeds], control, undefended)
    if len(rows) > 1:
        raise DataError(
            f"{records[1].folder}: expected the recipe of {folder} with another seed, found "
            "another recipe or the same seed; `ringfence gate` decides on one recipe"
        )
    return rows[0]


# ------------------------------------------------------------------ the terminal

_STYLES = {"pass": "green", "fail": "bold red", "missing": "bold red"}


def print_decision(decision: Decision, console: Console) -> None:
    """A line for each rule, a sentence for each that holds back, and the decision."""
    left_out = [verdict.rule.measure for verdict in decision.verdicts if verdict.word == "left out"]
    decided = [verdict for verdict in decision.verdicts if verdict.word != "left out"]
    cells = [_cells(verdict) for verdict in decided]
    beside = [max((len(row[place]) for row in cells), default=0) for place in range(1, 4)]
    room = console.width - sum(beside) - 9  # three gaps of three
    if any(len(part) >= room for row in cells for part in row[0].split(".")):
        # Intervals go below their means, so that no name breaks inside a word.
        cells = [
            (name, found.replace(" [", "\n["), limit, word) for name, found, limit, word in cells
        ]
        room += beside[0] - max(len(line) for row in cells for line in row[1].split("\n"))
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("measure", overflow="fold")
    for title in ("mean [95 % CI]", "limit", "verdict"):
        table.add_column(title, no_wrap=True)
    for verdict, (name, found, limit, word) in zip(decided, cells):
        styled = f"[{_STYLES[verdict.status]}]{word}[/]"
        table.add_row(escape(_at_dots(name, room)), escape(found), limit, styled)
    console.print(table)
    if left_out:
        line = f"left out because they were not measured and need not be: {', '.join(left_out)}"
        console.print(escape(line), highlight=False, style="dim")
    for verdict in decision.verdicts:
        if verdict.holds_back:
            why = f" ({verdict.rule.why})" if verdict.rule.why else ""
            line = f"{verdict.rule.measure}{why}: {verdict.sentence}"
            console.print(escape(line), highlight=False, soft_wrap=True)
    console.print(escape(f"Compared with: {decision.against}."), highlight=False, soft_wrap=True)
    for criterion in by_criterion(decision):
        if criterion.decisive.word == "left out":
            line = f"{criterion.name}, left out: {criterion.sentence}"
            console.print(escape(line), highlight=False, soft_wrap=True)
    colour = "green" if decision.ship else "red"
    line = f"[bold {colour}]{decision.word}[/] {escape(decision.run)}: {decision.counts}"
    console.print(line, highlight=False, soft_wrap=True)


def _cells(verdict: Verdict) -> tuple[str, str, str, str]:
    rule, measure = verdict.rule, verdict.measure
    found = f"{measure.kind} {measure}" if measure else ""
    limit = f">= {rule.min:g}" if rule.max is None else f"<= {rule.max:g}"
    word = "missing: HOLD" if verdict.word == "missing" else verdict.word
    return rule.measure, found, f"{rule.decides} {limit}", word


def _at_dots(name: str, width: int) -> str:
    """A measure's name in lines of at most `width`, broken after dots."""
    lines = [""]
    for part in re.findall(r"[^.]*\.|[^.]+$", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
