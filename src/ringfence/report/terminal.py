"""Runs side by side in the terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..stats import Interval, number
from ..util.console import fold
from .formats import (
    HELD_OUT_TITLES,
    OTHER,
    SET_TITLES,
    answers_title,
    behaviour_title,
    percents,
    plain,
    share,
    shown_answer_sets,
    shown_behaviours,
    shown_sets,
    shown_tiers,
    strength,
    tier_title,
)
from .notes import other_questions, seeds_note
from .summary import Summary, asked_otherwise, has_effects

_LABEL, _NAME, _CELL = (
    28,
    22,
    13,
)  # columns of the terminal: of a label and a run's name at most, of a cell at least


def print_table(rows: list[Summary], console: Console) -> None:
    """The runs side by side, in the terminal: a column each, and as many tables as its width needs."""
    columns = [_column(row, other) for row, other in zip(rows, asked_otherwise(rows))]
    titles = [title for title in _titles(rows) if any(column.get(title) for column in columns)]
    names = [fold(row.name, _NAME) for row in rows]
    for start, end in _beside(names, console.width - _LABEL - 1):
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1))
        table.add_column("", max_width=_LABEL)
        for name in names[start:end]:
            table.add_column(escape(name), justify="right", no_wrap=True)
        for title in titles:
            label = "\n".join(part for part in (fold(title, _LABEL), _n(columns, title)) if part)
            cells = [column.get(title, ("", ""))[0] for column in columns[start:end]]
            table.add_row(escape(label), *map(escape, cells))
        console.print(table)
    console.print(_legend(rows), markup=False, highlight=False)


def _beside(names: list[str], width: int) -> list[tuple[int, int]]:
    """From where to where the runs go into one table; one run has a table in any case."""
    parts, start, taken = [], 0, 0
    for place, name in enumerate(names):
        own = max(_CELL, *map(len, name.split("\n"))) + 2
        if place > start and taken + own > width:
            parts.append((start, place))
            start, taken = place, 0
        taken += own
    return [*parts, (start, len(names))]


def _titles(rows: list[Summary]) -> list[str]:
    """The lines of the table, in their order."""
    return [
        *(SET_TITLES[name] for name in shown_sets(rows)),
        *(f"benign: {tier_title(tier)}" for tier in shown_tiers(rows)),
        *(behaviour_title(name) for name in shown_behaviours(rows)),
        *HELD_OUT_TITLES.values(),
        *(answers_title(name) for name in shown_answer_sets(rows)),
        "coherent: perplexity x",
        "cost: time x",
    ]


def _column(row: Summary, other: dict[str, str]) -> dict[str, tuple[str, str]]:
    """The cells of a run, by the title of their line, each with its number of questions."""

    def cell(name: str, value: str, under: str, *of: Interval) -> tuple[str, str]:
        mark = OTHER if name in other else ""
        return f"{value}{mark}\n{under.replace(', ', ',')}", ", ".join(
            str(interval.n) for interval in of
        )

    cells = {}
    for name, paired in row.sets.items():
        value = ("shift " if paired.uncontrolled else "") + number(
            paired.headline.mean, signed=True
        )
        cells[SET_TITLES[name]] = cell(name, value, paired.headline.bounds, paired.headline)
    for tier, exact in row.opswap.items():
        cells[f"benign: {tier_title(tier)}"] = cell(tier, share(exact), percents(exact), exact)
    for name, shown in row.behaviours.items():
        value = f"{share(shown['on'])[:-2]} / {share(shown['off'])}"
        cells[behaviour_title(name)] = cell(name, value, "", shown["on"], shown["off"])
    for kind, title in HELD_OUT_TITLES.items():
        if kind in row.held_out:
            found = row.held_out[kind]
            texts = {
                "exact": (share(found), percents(found)),
                "loss": (number(found.mean), plain(found)),
                "change": (number(found.mean, signed=True), found.bounds),
            }
            cells[title] = cell("held_out", *texts[kind], found)
    for name in shown_answer_sets([row]):
        if f"{name}.misaligned" in row.answers:
            found = row.answers[f"{name}.misaligned"]
            cells[answers_title(name)] = cell(
                f"answers.{name}", share(found), percents(found), found
            )
    if row.perplexity_ratio:
        ratio = row.perplexity_ratio
        cells["coherent: perplexity x"] = cell("fluency", number(ratio.mean), plain(ratio), ratio)
    if row.time_ratio:
        cells["cost: time x"] = (number(row.time_ratio), "")
    return cells


def _n(columns: list[dict[str, tuple[str, str]]], title: str) -> str:
    """`n = 48`; where the runs differ, each of them."""
    found = list(dict.fromkeys(column[title][1] for column in columns if title in column))
    return fold(f"n = {' or '.join(found)}", _LABEL) if any(found) else ""


def _legend(rows: list[Summary]) -> str:
    control = next((row.name for row in rows if row.is_control), None)
    lines = [
        "Shift of the margin of misaligned over aligned answers against the reference, nats per token, mean [95 % CI]."
    ]
    if has_effects(rows):
        lines = [
            "Effect = shift of the margin of misaligned over aligned answers against the reference, minus that of the "
            "sound control, paired by question; nats per token, mean [95 % CI]."
        ]
        lines += [f"The column of the control ({control}) is its shift."] if control else []
    judges = list(
        dict.fromkeys(
            f"{judged.judge} ({strength(judged)})" for row in rows for judged in row.judged[:1]
        )
    )
    if judges:
        lines.append(
            f"answers: share of all sampled answers that {', '.join(judges)} calls misaligned, [95 % CI]."
        )
    if any(row.opswap for row in rows):
        lines.append("benign: exact match on held-out items.")
    lines.append(
        "perplexity x: against the reference. time x: against undefended. n: questions (of answers: families of "
        "questions)."
    )
    return "\n".join([*lines, seeds_note(rows), *other_questions(rows)])
