"""Erosion by layer: in words, as a table, as a figure; from the numbers alone."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ...util.plots import colour
from ..diagnosis import Numbers, Table, shown
from ..texts import SIDES


def say(numbers: Numbers) -> str:
    """See `Showing`."""
    first, last = numbers["middle"]
    where = f"mean over layers {first} to {last} of {numbers['layers']}"
    halves = f"from {numbers['fitted']} questions, measured on {numbers['measured']} others"
    setting = f"directions {halves}; {where}"
    absent = [
        side
        for side in SIDES
        if any(numbers["gap"][side][at - 1]["low"] <= 0 for at in _middle(numbers))
    ]
    if absent:
        return (
            f"Erosion is unknown ({setting}): on {' and on '.join(absent)} text the reference does "
            "not differ from the base along the direction from the other half of the questions, in "
            "at least one of these layers. More questions, or a base that differs more, may show "
            "it."
        )
    parts = []
    for name, found in numbers["tuned"].items():
        misaligned, aligned = found["misaligned"], found["aligned"]
        parts.append(
            f"{name} moved {shown(misaligned['headline'])} of the way from the reference back to "
            f"the base on misaligned text, {shown(aligned['headline'])} on aligned text, "
            f"difference {shown(found['difference'])}: {verdict(found)}; across the direction it "
            f"moved {misaligned['across_headline']:.2f} of that way on misaligned and "
            f"{aligned['across_headline']:.2f} on aligned text."
        )
    lines = "\n".join(parts)
    return f"{lines}\n0 = the reference, 1 = the base; {setting}."


def verdict(found: Numbers) -> str:
    """What the intervals of one tuned model show."""
    misaligned, aligned = (found[side]["headline"] for side in SIDES)
    difference = found["difference"]
    if difference is None:
        return "unknown"
    if all(headline["low"] <= 0 <= headline["high"] for headline in (misaligned, aligned)):
        return "no erosion seen"
    if misaligned["high"] < 0:
        return "no erosion, it moved away from the base"
    if misaligned["low"] <= 0:
        return "no erosion seen on misaligned text"
    return f"{'' if difference['low'] > 0 else 'not '}specific to misaligned text"


def table(numbers: Numbers) -> Table:
    """See `Showing`."""

    def cell(value: Any) -> str:
        if value is None:
            return "unknown"
        return f"{value:.2f}" if isinstance(value, float) else shown(value)

    columns = ["model", "erosion, misaligned text", "erosion, aligned text (control)"]
    columns += ["difference", "across, misaligned", "verdict"]
    rows = []
    for name, found in numbers["tuned"].items():
        headlines = [found[side]["headline"] for side in SIDES]
        values = [*headlines, found["difference"], found["misaligned"]["across_headline"]]
        rows.append([name, *map(cell, values), verdict(found)])
    return Table(columns, rows)


def draw(numbers: Numbers) -> Figure:
    """Left: erosion by layer; right: drift across the direction. Dashed: aligned text."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=[1.7, 1])
    seen = [0.0, 1.0]
    for place, found in enumerate(numbers["tuned"].values()):
        for side, dashes, shade in zip(SIDES, ("-", "--"), (0.18, 0.07)):
            curve = found[side]["erosion"]
            mean, low, high = (
                _line([point and point[end] for point in curve]) for end in ("mean", "low", "high")
            )
            across = _line(found[side]["across"])
            layers = range(1, len(curve) + 1)
            left.plot(layers, mean, dashes, color=colour(place), linewidth=1.6)
            left.fill_between(layers, low, high, color=colour(place), alpha=shade, linewidth=0)
            right.plot(layers, across, dashes, color=colour(place), linewidth=1.6)
            ends = [end[at - 1] for at in _middle(numbers) for end in (low, high)]
            seen += [end for end in ends if not np.isnan(end)]
    # Outer layers, where the gap is small, may leave the frame.
    room = 0.1 * (max(seen) - min(seen))
    left.set_ylim(min(seen) - room, max(seen) + room)
    left.axhline(0, color="#444444", linewidth=1)
    left.axhline(1, color="#9aa5b1", linewidth=1.5)
    left.set_ylabel("erosion (0 = reference, 1 = base)")
    right.set_ylabel("drift across the direction\n(1 = from reference to base)")
    right.set_ylim(bottom=0)
    first, last = numbers["middle"]
    for axes in (left, right):
        axes.axvspan(first - 0.5, last + 0.5, color="#f4f4f4", zorder=-5)
        axes.set_xlim(0.5, numbers["layers"] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("residual stream after layer")
    keys: list[Any] = [
        Patch(color=colour(place), label=name) for place, name in enumerate(numbers["tuned"])
    ]
    keys += [
        Line2D([], [], color="#555555", label="misaligned text"),
        Line2D([], [], color="#555555", linestyle="--", label="aligned text (control)"),
        Patch(color="#ececec", label="layers of the headline"),
    ]
    columns = min(len(keys), 6)
    figure.legend(handles=keys, loc="upper center", ncols=columns, bbox_to_anchor=(0.5, 0.0))
    figure.tight_layout()
    return figure


def _line(values: list[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]


def _middle(numbers: Numbers) -> range:
    """The layers of the headline, from 1."""
    first, last = numbers["middle"]
    return range(first, last + 1)
