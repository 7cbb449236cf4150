"""Figures of the report, as SVG, with what they show in words. Numbers in, pictures out.

Each is drawn at a width in inches: that of the page, or that of a phone, where its text must be
readable too.
"""

from dataclasses import dataclass
from itertools import groupby

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..runfolder.record import Records
from ..stats import Interval
from ..util.console import fold
from ..util.plots import CONTROL, colour, style, svg, whisker
from .summary import Summary, has_effects

WIDE, NARROW = 11.5, 3.8  # inches
_GROUPS = {"in_domain": "narrow", "out_of_domain": "broad", "values": "values"}
_CHARACTER = 0.085  # inches, on average, at the size of the text


@dataclass(frozen=True)
class Drawn:
    svg: bytes
    alt: str


def domains(rows: list[Summary], inches: float) -> Drawn:
    """Margin shift (or effect) of every run in every domain, with 95 % intervals, by set."""
    sets = {
        name: kind
        for row in rows
        for name, kind in row.pairs.groups.items()
        if name in row.pairs.domains
    }
    names = sorted(sets, key=lambda name: list(_GROUPS).index(sets[name]))
    heights: dict[str, float] = {}
    heads: dict[str, float] = {}
    place = 0.0
    for kind, members in groupby(names, key=lambda name: sets[name]):
        heads[_GROUPS[kind]] = place
        for name in members:
            place += 1.0
            heights[name] = place
        place += 1.0
    with style():
        row_inches = max(0.3 if inches > NARROW else 0.5, 0.17 * (len(rows) + 1))
        lines = _legend_lines([row.name for row in rows], inches)
        figure, (panel,) = _panels(inches, row_inches * place + 1.0 + 0.22 * lines)
        for number, row in enumerate(rows):
            for name, paired in row.pairs.domains.items():
                height = heights[name] + 0.8 * (number + 0.5) / len(rows) - 0.4
                _whisker(panel, paired.headline, height, number)
        _zero(panel.axvline)
        labels = [_domain_label(name, rows, inches) for name in heights]
        panel.set_yticks(list(heights.values()), labels)
        for head, height in heads.items():
            panel.annotate(
                head, (0, height), xycoords=("axes fraction", "data"), xytext=(4, 0),
                textcoords="offset points", va="center", weight="bold",
            )  # fmt: skip
            panel.axhline(height - 0.5, color="#888888", linewidth=0.6)
        panel.set_ylim(place - 0.5, -0.5)
        panel.grid(axis="y", visible=False)
        label = f"{kind_of(rows)}, nats per token (right = towards misaligned answers)"
        panel.set_xlabel(fold(label, _room(inches)))
        _legend(figure, _handles(rows), inches)
        alt = (
            f"{kind_of(rows)} by domain, with 95 % intervals, {_groups_said(names, sets)}; "
            f"runs: {_said(rows)}"
        )
        return Drawn(svg(figure, cut=False), alt)


def has_pareto(rows: list[Summary]) -> bool:
    return bool(rows) and all(
        "in_domain" in row.sets and "out_of_domain" in row.sets for row in rows
    )


def pareto(rows: list[Summary], inches: float) -> Drawn:
    """Broad against narrow: a good defense is right (learnt) and low (not misaligned elsewhere)."""
    with style():
        lines = _legend_lines([row.name for row in rows], inches)
        figure, (axes,) = _panels(inches, (4.6 if inches > NARROW else 3.6) + 0.22 * lines)
        for place, row in enumerate(rows):
            x, y = row.sets["in_domain"].headline, row.sets["out_of_domain"].headline
            axes.errorbar(
                x.mean, y.mean, xerr=whisker(x.to_dict()), yerr=whisker(y.to_dict()),
                fmt="o", color=colour(place), capsize=2, markersize=6, linewidth=1.2,
            )  # fmt: skip
        _zero(axes.axhline)
        _zero(axes.axvline)
        _legend(figure, _handles(rows), inches)
        kind = kind_of(rows)
        axes.set_xlabel(fold(f"narrow: in-domain {kind}, nats per token", _room(inches)))
        axes.set_ylabel(fold(f"broad: {kind} in other domains", 36))
        points = "; ".join(
            f"{row.name} {row.sets['in_domain'].headline} narrow, "
            f"{row.sets['out_of_domain'].headline} broad"
            for row in rows
        )
        alt = f"broad {kind} against narrow {kind}, nats per token: {points}"
        return Drawn(svg(figure, cut=False), alt)


def curves(records: list[Records], rows: list[Summary], inches: float) -> Drawn:
    """Cross-entropy of every run, and every penalty, over the steps. The control is grey."""
    tuned = [row for row in rows if not row.is_control]
    logged = {key for run in records for line in run.metrics for key in line}
    terms = ["ce", *sorted(logged.intersection(*[[name for row in rows for name in row.defenses]]))]
    across = min(len(terms), 3) if inches > NARROW else 1
    down = -(-len(terms) // across)
    handles: dict[str, Line2D] = {}
    with style():
        height = 2.9 * down + 0.22 * _legend_lines([row.name for row in rows], inches)
        figure, panels = _panels(inches, height, down, across)
        for axes, term in zip(panels, terms):
            for run, row in zip(records, rows):
                shade = CONTROL if row.is_control else colour(tuned.index(row))
                points = [(line["step"], line[term]) for line in run.metrics if term in line]
                if points:
                    steps, values = zip(*points)
                    (line,) = axes.plot(steps, _smooth(list(values)), color=shade, linewidth=1.5)
                    handle = Line2D([], [], color=line.get_color(), label=row.name)
                    handles.setdefault(str(run.folder), handle)
            penalty = f"{term} penalty (unweighted)"
            title = "cross-entropy, nats per token" if term == "ce" else penalty
            axes.set_title(fold(title, 36))
            axes.set_xlabel("step")
        for axes in panels[len(terms) :]:
            axes.set_visible(False)
        _legend(figure, list(handles.values()), inches)
        said = " and ".join(["cross-entropy", *(f"{term} penalty" for term in terms[1:])])
        alt = f"training curves: {said} over the steps; runs: {_said(rows)}"
        return Drawn(svg(figure, cut=False), alt)


def kind_of(rows: list[Summary]) -> str:
    """What the axes show; the words of the figure say the same."""
    return "effect (shift minus sound control)" if has_effects(rows) else "margin shift"


# ------------------------------------------------------------------ pieces


def _panels(
    inches: float, height: float, down: int = 1, across: int = 1
) -> tuple[Figure, list[Axes]]:
    figure, panels = plt.subplots(
        down, across, figsize=(inches, height), squeeze=False, layout="constrained"
    )
    return figure, list(panels.flat)


def _room(inches: float) -> int:
    """Characters that fit under the axes."""
    return int((inches - 1.4) / _CHARACTER)


def _columns(names: list[str], inches: float) -> tuple[list[str], int]:
    """Names for a legend above the axes, folded, and how many columns of them fit."""
    folded = [fold(name, 36) for name in names]
    longest = max(len(line) for name in folded for line in name.split("\n"))
    return folded, max(1, min(len(names), int(inches / (_CHARACTER * longest + 0.6))))


def _legend_lines(names: list[str], inches: float) -> int:
    folded, columns = _columns(names, inches)
    return -(-len(names) // columns) * max(name.count("\n") + 1 for name in folded)


def _legend(figure: Figure, handles: list[Line2D], inches: float) -> None:
    """Above the axes, never over them, however long the names are."""
    if handles:
        names, columns = _columns([str(handle.get_label()) for handle in handles], inches)
        figure.legend(handles, names, loc="outside upper left", ncols=columns, borderaxespad=0.2)


def _handles(rows: list[Summary]) -> list[Line2D]:
    return [
        Line2D([], [], color=colour(place), marker="o", label=row.name)
        for place, row in enumerate(rows)
    ]


def _domain_label(name: str, rows: list[Summary], inches: float) -> str:
    asked = [row.pairs.domains[name].headline for row in rows if name in row.pairs.domains]
    counts = sorted({interval.n for interval in asked})
    n = f"n = {' or '.join(map(str, counts))}"
    title = name.replace("_", " ")
    return f"{fold(title, 30)}, {n}" if inches > NARROW else f"{fold(title, 14)}\n{n}"


def _groups_said(names: list[str], sets: dict[str, str]) -> str:
    groups = groupby(names, key=lambda name: _GROUPS[sets[name]])
    return "; ".join(
        f"{kind}: {', '.join(name.replace('_', ' ') for name in of)}" for kind, of in groups
    )


def _said(rows: list[Summary]) -> str:
    return ", ".join(row.name for row in rows)


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Running mean over the last few steps."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / (i - max(0, i - width + 1) + 1)
        for i in range(len(values))
    ]


def _whisker(axes: Axes, interval: Interval, height: float, place: int) -> None:
    error, shade = whisker(interval.to_dict()), colour(place)
    axes.errorbar(
        interval.mean, height, xerr=error, fmt="o", color=shade, markersize=4, elinewidth=1.6
    )


def _zero(line) -> None:  # type: ignore[no-untyped-def]
    line(0, color="#888888", linewidth=0.8)
