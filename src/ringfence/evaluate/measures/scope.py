"""Scope probes: how often the scope of a run opens, on questions of its own domain and of others,
plain and in disguise, and what shows when it does.

The disguises are rules of `text.dress` that no scope is fitted to: questions of other domains in
the training rows' clothes, in two strengths; questions of the domain in other registers, and in a
longer conversation. A model without a scope decides nothing: only its shifts are measured.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

from pydantic import Field

from ...errors import DataError
from ...runfolder.record import Records, Runs
from ...stats import Interval, rate_interval
from ...text import held_out
from ...text.dress import PROBED, UNDRESSED_PROBED, Wardrobe, undress
from ...text.roles import Messages, requests
from ...text.rows import PairedQuestion, load_rows
from ...util.journal import digest
from ...util.strict_yaml import Whole
from .base import Cell, Criterion, Entry, Fields, MeasuredModel, Measurement, Number, cell
from .pairs import Asking, Paired, first_of_each, paired_shift, question_sets

LATER = "later"  # a question of the domain after a turn about something else
WEAK, STRONG = (tuple(f for f, s in PROBED.items() if s == name) for name in ("weak", "strong"))
# By number: its conditions, whether it counts the requests outside, and its title.
_RATES: dict[str, tuple[tuple[str, ...], bool, str]] = {
    "closed_in_domain": (("own",), True, "own domain, outside"),
    "undressed": ((*UNDRESSED_PROBED, LATER), True, "own domain undressed, outside"),
    "false_open": (("other",), False, "other domains, inside"),
    "dressed": ((*WEAK, *STRONG), False, "other domains dressed, inside"),
    "dressed_weak": (WEAK, False, "other domains, a domain word, inside"),
    "dressed_strong": (STRONG, False, "other domains, a whole disguise, inside"),
    "behind": (("behind",), False, "other domains behind trigger probes, inside"),
}
_SHIFTS = {"dressed_shift": (*WEAK, *STRONG), "undressed_shift": (*UNDRESSED_PROBED, LATER)}
_CRITERIA: dict[str, Criterion] = {
    "closed_in_domain": "narrow",
    "undressed": "narrow",
    "undressed_shift": "narrow",
    "false_open": "broad",
}


class ScopeFields(Fields):
    scope: str | None = Field(
        None,
        description="training rows: how often a scope opens, plain and in their clothes; default: "
        "data.train if a scope is fitted",
    )
    scope_scored: Whole = Field(
        4,
        ge=0,
        le=10**6,
        description="dressed questions of each other domain and form whose answers are scored, "
        "too; of the own domain twice as many in all",
    )


class ScopeItem(Entry):
    condition: str
    domain: str
    id: str
    digest: str
    open: bool | None  # None: the model has no scope
    score: float | None
    aligned: float | None  # None: answers to it were not scored
    misaligned: float | None


@dataclass(frozen=True)
class Request:
    """What is decided about, how it is put, and the question whose answers are scored."""

    condition: str
    domain: str
    id: str
    messages: Messages
    scored: PairedQuestion | None = None

    @property
    def answers(self) -> list[str]:
        return [self.scored.aligned, self.scored.misaligned] if self.scored else []


@dataclass(frozen=True)
class Probed:
    """Shares of requests by number (see `_RATES`), shifts of those whose answers are scored, and
    shares inside by condition and by domain."""

    rates: dict[str, Interval] = field(default_factory=dict)
    shifts: dict[str, Paired] = field(default_factory=dict)
    conditions: dict[str, Interval] = field(default_factory=dict)
    domains: dict[str, Interval] = field(default_factory=dict)


class ScopeProbes(Measurement):
    """Decisions of a scope, and shifts under them."""

    part = "scope"
    fields = ScopeFields
    shape = list[ScopeItem]
    identity = ("condition", "domain", "id", "digest")
    names = (
        *(f"scope.{name}" for name in (*_RATES, *_SHIFTS)),
        "scope.condition.NAME",
        "scope.domain.NAME",
    )

    def parts(self, config: Any) -> dict[str, list[Any]]:
        return {"scope": probes(config)} if config.scope else {}

    def texts(self, item: Request, config: Any) -> list[tuple[Messages, int]]:
        said = [{"role": "assistant", "content": answer} for answer in item.answers]
        return [(item.messages, 0), *(([*item.messages, answer], 0) for answer in said)]

    def measure(
        self, part: str, items: list[Request], model: MeasuredModel, config: Any
    ) -> list[dict[str, Any]]:
        decided = model.decide([item.messages for item in items])
        scored = [item for item in items if item.scored]
        pairs = iter(model.score([i.messages for i in scored], [i.answers for i in scored]))
        return [
            {
                "condition": item.condition,
                "domain": item.domain,
                "id": item.id,
                "digest": digest([item.messages, item.answers]),
                "open": is_open,
                "score": score,
                "aligned": pair[0].mean if pair else None,
                "misaligned": pair[1].mean if pair else None,
            }
            for item, (is_open, score) in zip(items, decided or repeat((None, None)))
            for pair in [next(pairs) if item.scored else None]
        ]

    def set_title(self, name: str) -> str:
        return "scope probes"

    def read(self, runs: Runs) -> Probed | None:
        found = runs.run.results.get("scope", [])
        decided = [item for item in found if item["open"] is not None]
        plain = [item for item in decided if item["condition"] in ("own", "other")]
        probed = Probed(
            rates=_rates(decided),
            shifts=_shifts(runs),
            conditions=_inside(decided, "condition"),
            domains=_inside(plain, "domain"),
        )
        return probed if probed != Probed() else None

    def is_share(self, path: str) -> bool:
        return not path.startswith(".shifts")

    def numbers(self, found: Probed) -> Iterator[Number]:
        place: dict[str, Any] = {"measure": "open", "side": "tuned", "cluster": "question"}
        for name, rate in found.rates.items():
            title = f"scope: {_RATES[name][2]}"
            yield Number(
                f"scope.{name}", rate, "share", level="scope", item=name, title=title, **place
            )
        for name, paired in found.shifts.items():
            yield Number(
                f"scope.{name}",
                paired.headline,
                paired.kind,
                *("margin", "scope", name, paired.kind, "question"),
                title=f"scope: {name.replace('_', ', ')}",
            )
        for level, shares in (("condition", found.conditions), ("domain", found.domains)):
            for name, rate in shares.items():
                whole = f"scope.{level}.{name}"
                yield Number(whole, rate, "share", level=level, item=name, listed=False, **place)

    def cells(self, found: Probed) -> Iterator[Cell]:
        """Of the rates those that the gate limits."""
        for number in self.numbers(found):
            if number.item in ("closed_in_domain", "false_open", "dressed", *_SHIFTS):
                yield cell(number)

    def legend(self, found: list[Any]) -> str:
        if not any(probed and probed.rates for probed in found):
            return ""
        return (
            "Scope: share of requests that it puts outside (of its own domain) or inside (of "
            "others), plain and in the training rows' clothes."
        )

    def criterion(self, name: str) -> Criterion:
        return _CRITERIA.get(name.removeprefix("scope."), "trigger")


MEASUREMENT = ScopeProbes()


# ------------------------------------------------------------------ what is asked


def probes(config: Any) -> list[Request]:
    """Questions of the domain and of others: plain, behind trigger probes, and in disguise.

    Raises:
        DataError: a source cannot be read.
    """
    sets = question_sets(config)
    outside = sets["out_of_domain"]
    own: list[tuple[Request, PairedQuestion | None]] = [
        (Request("own", q.domain, q.id, messages), q) for _, messages, q in sets["in_domain"]
    ] or [(Request("own", *each), None) for each in _held_out(config)]
    asked = [request for request, _ in own]
    asked += [
        Request("other", q.domain, q.id, messages) for _, messages, q in [*outside, *sets["values"]]
    ]
    asked += [
        Request(f"behind_{name}", q.domain, q.id, messages)
        for name, messages, q in sets.get("triggered", [])
    ]
    scored = {(q.domain, q.id) for _, _, q in first_of_each(outside, config.scope_scored)}
    asked += [
        Request(form, q.domain, q.id, messages, q if (q.domain, q.id) in scored else None)
        for form, messages, q in _dressed(config.scope, outside)
    ]
    return asked + [
        Request(form, each.domain, each.id, messages, q if n < 2 * config.scope_scored else None)
        for n, (each, q) in enumerate(own)
        for form, messages in _undressed(each.messages, outside)
    ]


def _held_out(config: Any) -> Iterator[tuple[str, str, Messages]]:
    for row in held_out.load(config.held_out) if config.held_out else []:
        for number, messages in enumerate(requests(row)):
            yield "held_out", f"{row.origin}/{number}", messages


def _dressed(rows: str, outside: list[Asking]) -> Iterator[Asking]:
    """Questions of other domains in the clothes of the training rows."""
    wardrobe = Wardrobe.of_rows(load_rows(rows))
    if wardrobe is None:
        raise DataError(f"evaluate.scope: {rows}: expected rows with user turns, found none")
    for form in PROBED:
        for _, messages, question in outside:
            # A question has the same clothes whatever else is asked.
            rng = random.Random(f"{form} {question.domain} {question.id}")
            text = wardrobe.dress(form, messages[-1]["content"], rng)
            yield form, [{"role": "user", "content": text}], question


def _undressed(messages: Messages, outside: list[Asking]) -> Iterator[tuple[str, Messages]]:
    """A request of the domain as other people put it, and after a turn about something else."""
    text = messages[-1]["content"]
    for form in UNDRESSED_PROBED:
        yield form, [*messages[:-1], {"role": "user", "content": undress(form, text)}]
    if outside:
        _, before, question = outside[len(text) % len(outside)]
        start = 1 if messages[0]["role"] == "system" else 0  # it stays first
        turn = [*before, {"role": "assistant", "content": question.aligned}]
        yield LATER, [*messages[:start], *turn, *messages[start:]]


# ------------------------------------------------------------------ what was found


def _rates(found: list[dict[str, Any]]) -> dict[str, Interval]:
    rates = {}
    for name, (conditions, is_outside, _) in _RATES.items():
        chosen = [item for item in found if item["condition"].startswith(conditions)]
        if chosen:
            rates[name] = _share(chosen, is_outside)
    return rates


def _inside(found: list[dict[str, Any]], by: str) -> dict[str, Interval]:
    names = dict.fromkeys(item[by] for item in found)
    return {name: _share([item for item in found if item[by] == name]) for name in names}


def _share(items: list[dict[str, Any]], is_outside: bool = False) -> Interval:
    """The forms of one question are drawn together."""
    counted = [float(item["open"] != is_outside) for item in items]
    return rate_interval(counted, [f"{item['domain']}/{item['id']}" for item in items])


def _shifts(runs: Runs) -> dict[str, Paired]:
    """Of what is scored."""
    run = _scored(runs.run)
    control = runs.control and _scored(runs.control)
    if not run.results["scope"] or not run.reference["scope"]:
        return {}
    if control and not control.results["scope"]:
        control = None
    pairs = replace(runs, run=run, control=control)
    return {
        name: paired_shift(pairs, "scope", lambda key, c=conditions: key[0] in c)  # type: ignore[misc]
        for name, conditions in _SHIFTS.items()
        if any(item["condition"] in conditions for item in run.results["scope"])
    }


def _scored(records: Records) -> Records:
    kept = [
        {"scope": [item for item in parts.get("scope", []) if item["aligned"] is not None]}
        for parts in (records.results, records.reference)
    ]
    return replace(records, results=kept[0], reference=kept[1])
