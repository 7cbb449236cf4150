"""What a reader must know of a table of runs: numbers that do not compare, and where seeds are."""

from .formats import (
    OTHER,
    SET_TITLES,
    tier_title,
)
from .summary import Summary, asked_otherwise


def other_questions(rows: list[Summary]) -> list[str]:
    """Which numbers do not compare, because they were measured on other questions than those of an earlier run."""
    notes = []
    for row, other in zip(rows, asked_otherwise(rows)):
        for first in dict.fromkeys(other.values()):
            sets = [_asked_title(name) for name in other if other[name] == first]
            where = "; ".join(dict.fromkeys(sets))
            notes.append(
                f"{OTHER} {row.name} was not measured on the questions of {first} ({where}): do not compare."
            )
    return notes


def _asked_title(name: str) -> str:
    if name.startswith("answers."):
        return f"answers, {name.removeprefix('answers.').replace('_', ' ')}"
    if name.startswith("behaviour_"):
        return name.replace("_", " ")
    other = {"fluency": "perplexity", "held_out": "held-out rows"}
    return SET_TITLES.get(name) or other.get(name) or tier_title(name)


def seeds_note(rows: list[Summary]) -> str:
    """What the intervals are over."""
    single = [row.name for row in rows if row.seeds == 1]
    if not single:
        return "Intervals are over seeds and questions."
    which = "" if len(single) == len(rows) else f" ({', '.join(single)})"
    return f"One seed{which}: its intervals are over questions alone, and do not say what another seed would give."
