"""Figures of the report, as SVG. Numbers in, pictures out."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..plots import colour, style, svg, whisker
from ..stats import Interval
from .summary import Records, Row, has_effects


def domains(rows: list[Row]) -> bytes:
    """Margin shift (or effect) of every run in every domain, with 95 % intervals."""
    names = list(dict.fromkeys(name for row in rows for name in row.domains))
    with style():
        figure, axes = plt.subplots(figsize=(9, 0.24 * len(names) * (len(rows) + 1) + 1.3))
        for place, row in enumerate(rows):
            for number, name in enumerate(names):
                if name in row.domains:
                    _whisker(axes, row.domains[name].headline, number + 0.8 * (place + 0.5) / len(rows) - 0.4, place)
        _zero(axes.axvline)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(f"{_kind(rows)}, nats per token (right = towards misaligned answers)")
        _legend(figure, axes, rows)
        return svg(figure)


def has_pareto(rows: list[Row]) -> bool:
    return bool(rows) and all("in_domain" in row.sets and "out_of_domain" in row.sets for row in rows)


def pareto(rows: list[Row]) -> bytes:
    """Broad against narrow: a good defense stands right (learnt) and low (not misaligned elsewhere)."""
    with style():
        figure, axes = plt.subplots(figsize=(6.5, 4.6))
        for place, row in enumerate(rows):
            x, y = row.sets["in_domain"].headline, row.sets["out_of_domain"].headline
            axes.errorbar(
                x.mean, y.mean, xerr=whisker(x.to_dict()), yerr=whisker(y.to_dict()),
                fmt="o", color=colour(place), capsize=2, markersize=6, linewidth=1.2, label=row.name,
            )  # fmt: skip
        _zero(axes.axhline)
        _zero(axes.axvline)
        axes.legend(bbox_to_anchor=(1.0, 1.0), loc="upper left")
        axes.set_xlabel(f"narrow: in-domain {_kind(rows)}, nats per token")
        axes.set_ylabel(f"broad: {_kind(rows)} in other domains")
        return svg(figure)


def curves(records: list[Records], rows: list[Row]) -> bytes:
    """Cross-entropy of every run, and every penalty, over the steps. The control is grey."""
    tuned = [row for row in rows if not row.is_control]
    logged = {key for run in records for line in run.metrics for key in line}
    terms = ["ce", *sorted(logged.intersection(*[[name for row in rows for name in row.defenses]]))]
    with style():
        figure, panels = plt.subplots(1, len(terms), figsize=(4.2 * len(terms), 3.3), squeeze=False)
        for axes, term in zip(panels[0], terms):
            for run, row in zip(records, rows):
                shade = "#888888" if row.is_control else colour(tuned.index(row))
                points = [(line["step"], line[term]) for line in run.metrics if term in line]
                if points:
                    steps, values = zip(*points)
                    axes.plot(steps, _smooth(list(values)), color=shade, label=run.name, linewidth=1.3)
            axes.set_title(
                "cross-entropy, nats per token" if term == "ce" else f"{term} penalty (unweighted)", fontsize=10
            )
            axes.set_xlabel("step")
            axes.legend(fontsize=8)
        figure.tight_layout()
        return svg(figure)


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Running mean over the last few steps."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i - max(0, i - width + 1) + 1) for i in range(len(values))]


def _whisker(axes: Axes, interval: Interval, height: float, place: int) -> None:
    error = whisker(interval.to_dict())
    axes.errorbar(interval.mean, height, xerr=error, fmt="o", color=colour(place), markersize=4, elinewidth=1.6)


def _legend(figure: Figure, axes: Axes, rows: list[Row]) -> None:
    handles = [Line2D([], [], color=colour(place), marker="o", label=row.name) for place, row in enumerate(rows)]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(rows), borderaxespad=0.3)


def _zero(line) -> None:  # type: ignore[no-untyped-def]
    line(0, color="#888888", linewidth=0.8)


def _kind(rows: list[Row]) -> str:
    return "effect (shift minus sound control)" if has_effects(rows) else "margin shift"
