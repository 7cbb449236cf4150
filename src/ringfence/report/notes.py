"""What a reader must know about a table of runs: which numbers do not compare, and what the
intervals are over."""

from ..evaluate.config import MEASUREMENTS
from .summary import Summary, asked_otherwise

OTHER = "*"  # marks a number that was measured on other questions


def legends(rows: list[Summary], but: tuple[str, ...] = ()) -> list[str]:
    """What the cells of a table mean, measurement by measurement; some left out."""
    legends = []
    for name, measurement in MEASUREMENTS.items():
        found = [row.found[name] for row in rows if name in row.found]
        legends += [measurement.legend(found)] if found and name not in but else []
    return [legend for legend in legends if legend]


def other_questions(rows: list[Summary]) -> list[str]:
    """Which numbers do not compare, because they were measured on other questions than those of an
    earlier run."""
    notes = []
    for row, other in zip(rows, asked_otherwise(rows)):
        for first in dict.fromkeys(other.values()):
            sets = [row.asked[name].title for name in other if other[name] == first]
            where = "; ".join(dict.fromkeys(sets))
            notes.append(
                f"{OTHER} {row.name} was not measured on the questions of {first} ({where}): "
                "do not compare."
            )
    return notes


def seeds_note(rows: list[Summary]) -> str:
    """What the intervals are over."""
    single = [row.name for row in rows if row.seeds == 1]
    if not single:
        return "Intervals are over seeds and questions."
    which = "" if len(single) == len(rows) else f" ({', '.join(single)})"
    return (
        f"One seed{which}: its intervals are over questions alone, and do not say what another "
        "seed would give."
    )
