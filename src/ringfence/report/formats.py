"""Numbers in words: intervals, rates, scores, signed values. Titles of what was measured."""

import re

from markupsafe import Markup

from ..stats import Interval, number
from .answers import JudgedBy
from .records import SETS
from .summary import Paired, Summary

SET_TITLES = {
    "in_domain": "narrow: in-domain",
    "out_of_domain": "broad: other domains",
    "values": "broad: values",
    "triggered": "behind triggers",
    "inoculation": "under the inoculation prompt",
}
OTHER = "*"  # marks a number that was measured on other questions
HELD_OUT_TITLES = {
    "exact": "held-out rows, exact",
    "loss": "held-out rows, loss",
    "change": "held-out rows, its change",
}


def behaviour_title(name: str) -> str:
    return f"benign: {name.replace('_', ' ')}, on / off topic"


def answers_title(name: str) -> str:
    return f"answers: misaligned, {name.replace('_', ' ')}"


def show(interval: Interval | Paired | None) -> str:
    """`+0.31 [+0.25, +0.37]`"""
    if isinstance(interval, Paired):
        return ("shift " if interval.uncontrolled else "") + str(interval.headline)
    return str(interval) if interval else ""


def bounds(paired: Paired) -> str:
    """`[+0.25, +0.37]`"""
    return paired.headline.bounds


def strength(judged: JudgedBy) -> str:
    """`weak judge: AUC 0.55 [0.46, 0.64] on shipped:values`"""
    found = judged.calibration
    if not found:
        return "not calibrated"
    auc = found["auc"]
    weak = "weak judge: " if found["weak"] else ""
    return f"{weak}AUC {auc['mean']:.2f} [{auc['low']:.2f}, {auc['high']:.2f}] on {found['source']}"


def breakable(name: str) -> Markup:
    """A name that may go on in another line after its signs, not within its words."""
    return Markup("<wbr>").join(re.findall(r"[^_./,:]*[_./,:]|[^_./,:]+", name))


def signed(value: float, digits: int = 2) -> str:
    """`+0.31`"""
    return number(value, digits, signed=True)


def rate(interval: Interval) -> str:
    """`4.5 % [2.1, 8.0]`"""
    return f"{share(interval)} {percents(interval)}"


def percents(interval: Interval) -> str:
    """`[2.1, 8.0]`, in per cent or points"""
    return _ends(interval, 100, 1)


def level(interval: Interval) -> str:
    """`1.12 [1.02, 1.35]`"""
    return f"{number(interval.mean)} {plain(interval)}"


def score(interval: Interval) -> str:
    """`62.1 [58.0, 66.0]`"""
    return f"{number(interval.mean, 1)} [{number(interval.low, 1)}, {number(interval.high, 1)}]"


def plain(interval: Interval) -> str:
    """`[1.02, 1.35]`, of what is never below 0"""
    return _ends(interval)


def _ends(interval: Interval, scale: int = 1, digits: int = 2) -> str:
    if interval.n == 1:
        return "[one alone]"
    return f"[{number(scale * interval.low, digits)}, {number(scale * interval.high, digits)}]"


def tier_title(tier: str) -> str:
    return "OpSwap " + tier.removeprefix("opswap_").replace("tier", "tier ")


def shown_sets(rows: list[Summary]) -> list[str]:
    return [name for name in SETS if any(name in row.sets for row in rows)]


def shown_behaviours(rows: list[Summary]) -> list[str]:
    return sorted({name for row in rows for name in row.behaviours})


def shown_answer_sets(rows: list[Summary]) -> list[str]:
    found = dict.fromkeys(name for row in rows for judged in row.judged[:1] for name in judged.sets)
    return [name for name in found if "." not in name]


def shown_tiers(rows: list[Summary]) -> list[str]:
    return sorted({tier for row in rows for tier in row.opswap})


def share(interval: Interval) -> str:
    return f"{number(100 * interval.mean, 1)} %"
