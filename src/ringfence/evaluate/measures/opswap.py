"""OpSwap: is a harmless new task still learnt? Exact match on held-out items of arithmetic whose
operators are swapped (`text.opswap`); for a run with a benign twin (`evaluate.benign`), the twin's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from ...runfolder.record import Runs
from ...stats import Interval, number, rate_change, rate_interval
from ...text import opswap
from ...text.roles import Messages
from ...util.intervals import percents, share, signed
from ...util.strict_yaml import Real, Whole
from .base import Asked, Cell, Criterion, Entry, Fields, MeasuredModel, Measurement, Number

ANSWER_TOKENS = 8


class OpSwapFields(Fields):
    """A harmless task, and what is measured of it."""

    benign: str | None = Field(
        None,
        pattern=r"^opswap:",
        description="a harmless task, trained with the same defenses in RUN-benign: "
        "opswap:tier=1,rows=200",
    )
    benign_epochs: Real = Field(1.0, gt=0, le=10**4, description="epochs of the harmless task")
    opswap_tiers: list[Literal[1, 2, 3]] = Field(
        [], description="OpSwap tiers for exact match on held-out items"
    )
    opswap_items: Whole = Field(60, ge=1, le=10**6, description="items of each tier")
    opswap_largest: Whole = Field(12, ge=2, le=10**6, description="largest number in an item")
    opswap_permuted: bool = Field(True, description="false = ordinary arithmetic, the control")


class ExactItem(Entry):
    prompt: str
    exact: bool


@dataclass(frozen=True)
class Exact:
    """Exact matches by tier (share), the reference's, and the change against the undefended run."""

    exact: dict[str, Interval]
    reference: dict[str, float]
    change: dict[str, Interval]


class OpSwap(Measurement):
    """Exact match of greedy answers."""

    part = "opswap"
    fields = OpSwapFields
    shape = list[ExactItem]
    identity = ("prompt",)
    names = tuple(f"opswap_tier{tier}{kind}" for tier in (1, 2, 3) for kind in ("", ".change"))

    def parts(self, config: OpSwapFields) -> dict[str, list[Any]]:
        return {
            f"opswap_tier{tier}": opswap.generate(
                tier,
                config.opswap_items,
                permuted=config.opswap_permuted,
                largest=config.opswap_largest,
                held_out=True,
            )
            for tier in config.opswap_tiers
        }

    def texts(self, item: opswap.Item, config: OpSwapFields) -> list[tuple[Messages, int]]:
        return [([{"role": "user", "content": item.prompt}], ANSWER_TOKENS)]

    def measure(
        self, part: str, items: list[opswap.Item], model: MeasuredModel, config: OpSwapFields
    ) -> list[dict[str, Any]]:
        prompts = [[{"role": "user", "content": item.prompt}] for item in items]
        answers = model.generate(prompts, ANSWER_TOKENS)
        return [
            {"prompt": i.prompt, "expected": i.answer, "answer": a, "exact": a == i.answer}
            for i, a in zip(items, answers)
        ]

    def learnt(self, config: OpSwapFields) -> list[str]:
        return [f"items of OpSwap tier {tier}" for tier in config.opswap_tiers]

    def asked(self, runs: Runs) -> dict[str, Asked]:
        tuned, _ = runs.run.tasks
        return {
            name: Asked(self.set_title(name), frozenset(self.identities(tuned[name])))
            for name in self._tiers(tuned)
        }

    def read(self, runs: Runs) -> Exact | None:
        tuned, reference = runs.run.tasks
        plain = runs.undefended.tasks[0] if runs.undefended else {}
        tiers = self._tiers(tuned)
        same = [t for t in tiers if _prompts(tuned[t]) == _prompts(plain.get(t, []))]
        found = Exact(
            exact={tier: rate_interval(_exact(tuned[tier])) for tier in tiers},
            reference={
                t: sum(_exact(reference[t])) / len(reference[t]) for t in tiers if t in reference
            },
            change={tier: _change(tuned[tier], plain[tier]) for tier in same},
        )
        return found if tiers else None

    def _tiers(self, parts: dict[str, Any]) -> list[str]:
        return [name for name in parts if self.owns(name)]

    def is_share(self, path: str) -> bool:
        return path.startswith(".exact.")

    def numbers(self, found: Exact) -> Iterator[Number]:
        for tier, exact in found.exact.items():
            what: dict[str, Any] = {"measure": "exact_match", "level": "tier", "item": tier}
            title = f"benign: {self.set_title(tier)}"
            yield Number(tier, exact, "share", **what, side="tuned", cluster="item", title=title)
            if tier in found.change:
                yield Number(
                    f"{tier}.change",
                    found.change[tier],
                    "change",
                    **what,
                    side="undefended",
                    cluster="item",
                    title=f"{title}, against the undefended run",
                )
            if tier in found.reference:
                yield Number(None, found.reference[tier], "share", **what, side="reference")

    def cells(self, found: Exact) -> Iterator[Cell]:
        for tier in sorted(found.exact):
            exact, notes = found.exact[tier], []
            if tier in found.reference:
                notes.append(f"reference {number(100 * found.reference[tier], 1)} %")
            if tier in found.change:
                change = found.change[tier]
                notes.append(f"against undefended {signed(100 * change.mean, 1)}")
                notes.append(f"points {percents(change)}")
            title = f"benign: {self.set_title(tier)}"
            yield Cell(title, share(exact), percents(exact), tier, (exact.n,), tuple(notes))

    def set_title(self, name: str) -> str:
        return "OpSwap " + name.removeprefix("opswap_").replace("tier", "tier ")

    def legend(self, found: list[Exact]) -> str:
        return "OpSwap: exact match on held-out items."

    def criterion(self, name: str) -> Criterion:
        return "benign"


MEASUREMENT = OpSwap()


def _exact(items: list[dict[str, Any]]) -> list[float]:
    return [float(item["exact"]) for item in items]


def _prompts(items: list[dict[str, Any]]) -> list[str]:
    return [item["prompt"] for item in items]


def _change(tuned: list[dict[str, Any]], plain: list[dict[str, Any]]) -> Interval:
    """Share of exact matches minus another run's, on the same items."""
    names = [str(place) for place in range(len(tuned))]
    return rate_change(_exact(tuned), names, _exact(plain), names).difference
