"""The named values of a run: what a policy sets limits on and a model card lists. Knows rows of the report only.

| name | value | kind |
|---|---|---|
| `in_domain`, `out_of_domain`, `values`, `triggered`, `inoculation` | margin against the reference, nats per token | \
effect where there is a control, else shift |
| the same with `.by_domain` | the same mean, its interval over whole domains | effect or shift |
| `domain.NAME`, `condition.NAME` | of one domain; of one disguise of the trigger probes | effect or shift |
| `margin.in_domain` and so on | the margin itself; all there is without a reference | margin |
| `perplexity_ratio` | perplexity of ordinary answers, against the reference's | ratio |
| `opswap_tier1` to `opswap_tier3` | exact matches, 0 to 1 | share |
| `opswap_tier1.change` to `opswap_tier3.change` | the same minus those of the undefended run, item by item | change |
| `behaviour_NAME.on`, `behaviour_NAME.off` | answers that show it, on and off its topic, 0 to 1 | share |
| `held_out.loss`, `held_out.change`, `held_out.exact` | your own rows: nats per token, against the reference's, exact \
matches | loss, change, share |
| `answers.SET.METRIC`, `answers.em_f1.SET` | judged answers, by the first judge (docs/metrics.md) | judged |
| `time_ratio` | training time against the undefended run's; one number, no interval | ratio |
"""

from dataclasses import dataclass
from typing import Literal

from ..errors import RecipeError, nearest
from ..evaluate.answers.judged import RATES, SCORES
from ..stats import Interval
from .records import SETS
from .summary import Paired, Summary

Kind = Literal["effect", "shift", "margin", "ratio", "share", "loss", "change", "judged"]
HELD_OUT: dict[str, Kind] = {"loss": "loss", "change": "change", "exact": "share"}
NAMES = (
    *SETS,
    *(f"{name}.by_domain" for name in SETS),
    *(f"margin.{name}" for name in SETS),
    *("perplexity_ratio", "time_ratio"),
    *(f"opswap_tier{tier}{kind}" for tier in (1, 2, 3) for kind in ("", ".change")),
    *(f"held_out.{name}" for name in HELD_OUT),
)
FAMILIES = (
    "domain.NAME",
    "condition.NAME",
    "behaviour_NAME.on",
    "answers.SET.METRIC",
    "answers.em_f1.SET",
)


@dataclass(frozen=True)
class Measure:
    """A value with its interval.

    Attributes:
        kind: what sort of number; an effect (there was a sound control) is more than a mere shift.
        judge: who judged, where answers were.
        weak: a judge that calibration found weak; the value proves nothing.
    """

    name: str
    interval: Interval
    kind: Kind
    judge: str | None = None
    weak: bool = False

    def show(self) -> str:
        """`+0.234 [+0.19, +0.26]`, signed where it is a difference; a number without an interval stands alone."""
        signed = self.kind in ("effect", "shift", "margin", "change") or self.name.endswith(
            ".change"
        )
        mean, low, high = (
            f"{value:{'+' if signed else ''}.3g}"
            for value in (self.interval.mean, self.interval.low, self.interval.high)
        )
        if self.interval.n > 1:
            return f"{mean} [{low}, {high}]"
        return mean if self.interval.low == self.interval.high else f"{mean} [one alone]"


def measures(row: Summary) -> dict[str, Measure]:
    """All that was measured of a run, by name; see the table above."""
    found: dict[str, tuple[Interval, Kind]] = {}
    for name, paired in row.sets.items():
        found[name] = paired.headline, kind_of(paired)
        found[f"{name}.by_domain"] = (
            paired.effect_by_domain or paired.shift_by_domain,
            kind_of(paired),
        )
    found |= {
        f"domain.{name}": (paired.headline, kind_of(paired)) for name, paired in row.domains.items()
    }
    found |= {
        f"condition.{name}": (paired.headline, kind_of(paired))
        for name, paired in row.conditions.items()
    }
    found |= {f"margin.{name}": (interval, "margin") for name, interval in row.margins.items()}
    if row.perplexity_ratio:
        found["perplexity_ratio"] = row.perplexity_ratio, "ratio"
    found |= {tier: (interval, "share") for tier, interval in row.opswap.items()}
    found |= {
        f"{tier}.change": (interval, "change") for tier, interval in row.opswap_change.items()
    }
    for behaviour, shown in row.behaviours.items():
        found |= {f"{behaviour}.{topic}": (interval, "share") for topic, interval in shown.items()}
    found |= {
        f"held_out.{name}": (interval, HELD_OUT[name]) for name, interval in row.held_out.items()
    }
    if row.time_ratio is not None and row.undefended:  # not of the undefended run itself
        found["time_ratio"] = Interval(row.time_ratio, row.time_ratio, row.time_ratio, 1), "ratio"
    named = {name: Measure(name, *value) for name, value in found.items()}
    for judged in row.judged[:1]:
        weak = bool(judged.calibration and judged.calibration["weak"])
        for name, interval in judged.measures.items():
            named[f"answers.{name}"] = Measure(
                f"answers.{name}", interval, "judged", judged.judge, weak
            )
    return named


def kind_of(paired: Paired) -> Literal["effect", "shift"]:
    """Which of the two `Paired.headline` is."""
    return "effect" if paired.effect else "shift"


def check_name(name: str) -> None:
    """Is there such a measure at all, in this run or another?

    Raises:
        RecipeError: no, with the nearest that there is.
    """
    family, *parts = name.split(".")
    if name in NAMES or (all(parts) and _in_family(family, parts)):
        return
    metrics = (
        [f"answers.{'.'.join(parts[:-1])}.{metric}" for metric in (*RATES, *SCORES)]
        if len(parts) > 1
        else []
    )
    raise RecipeError(f"unknown measure {name!r}{nearest(name, [*NAMES, *FAMILIES, *metrics])}")


def _in_family(family: str, parts: list[str]) -> bool:
    if family in ("domain", "condition"):
        return bool(parts)
    if family.startswith("behaviour_"):
        return parts in (["on"], ["off"])
    if family != "answers" or len(parts) < 2:
        return False
    metric = parts[-2] if parts[-1] == "change" else parts[-1]
    return parts[0] == "em_f1" or metric.split("@")[0] in (*RATES, *SCORES)
