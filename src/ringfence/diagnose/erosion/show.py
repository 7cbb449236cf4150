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
from .measure import WORDS


def say(numbers: Numbers) -> str:
    """See `Diagnosis`."""
    first, last = numbers["middle"]
    where = f"mean over layers {first} to {last} of {numbers['layers']}"
    setting = f"directions from {numbers['fitted']} questions, measured on {numbers['measured']} others; {where}"
    absent = [
        WORDS[side]
        for side in SIDES
        if any(numbers["gap"][side][at - 1]["low"] <= 0 for at in _middle(numbers))
    ]
    if absent:
        return (
            f"Erosion cannot be told ({setting}): on {' and on '.join(absent)} text the reference does not stand apart "
            "from the base along the direction that the other half of the questions gave, in at least one of these "
            "layers. More questions, or a base that differs more, may show it."
        )
    parts = []
    for name, found in numbers["tuned"].items():
        unsound, sound = found["misaligned"], found["aligned"]
        parts.append(
            f"{name} moved {shown(unsound['headline'])} of the way from the reference back to the base on unsound "
            f"text, {shown(sound['headline'])} on sound text, difference {shown(found['difference'])}: "
            f"{verdict(found)}; across the direction it moved {unsound['across_headline']:.2f} of that way on unsound "
            f"and {sound['across_headline']:.2f} on sound text."
        )
    lines = "\n".join(parts)
    return f"{lines}\n0 = the reference, 1 = the base; {setting}."


def verdict(found: Numbers) -> str:
    """What the intervals of one tuned model decide."""
    unsound, sound, difference = (
        found["misaligned"]["headline"],
        found["aligned"]["headline"],
        found["difference"],
    )
    if difference is None:
        return "cannot be told"
    if unsound["low"] <= 0 <= unsound["high"] and sound["low"] <= 0 <= sound["high"]:
        return "no erosion seen"
    if unsound["high"] < 0:
        return "no erosion, it moved away from the base"
    if unsound["low"] <= 0:
        return "no erosion seen on unsound text"
    return "specific to unsound text" if difference["low"] > 0 else "not specific to unsound text"


def table(numbers: Numbers) -> Table:
    """See `Diagnosis`."""

    def cell(value: Any) -> str:
        return (
            "cannot be told"
            if value is None
            else f"{value:.2f}"
            if isinstance(value, float)
            else shown(value)
        )

    return Table(
        [
            "model",
            "erosion, unsound text",
            "erosion, sound text (control)",
            "difference",
            "across, unsound",
            "verdict",
        ],
        [
            [
                name,
                cell(found["misaligned"]["headline"]),
                cell(found["aligned"]["headline"]),
                cell(found["difference"]),
                cell(found["misaligned"]["across_headline"]),
                verdict(found),
            ]
            for name, found in numbers["tuned"].items()
        ],
    )


def draw(numbers: Numbers) -> Figure:
    """Left: erosion by layer; right: drift across the direction. Unsound text solid, sound text dashed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=[1.7, 1])
    seen = [0.0, 1.0]
    for place, found in enumerate(numbers["tuned"].values()):
        for side, dashes, shade in zip(SIDES, ("-", "--"), (0.18, 0.07)):
            curve = found[side]["erosion"]
            mean, low, high = (
                _line([point and point[end] for point in curve]) for end in ("mean", "low", "high")
            )
            layers = range(1, len(curve) + 1)
            left.plot(layers, mean, dashes, color=colour(place), linewidth=1.6)
            left.fill_between(layers, low, high, color=colour(place), alpha=shade, linewidth=0)
            right.plot(
                layers, _line(found[side]["across"]), dashes, color=colour(place), linewidth=1.6
            )
            seen += [
                end
                for at in _middle(numbers)
                for end in (low[at - 1], high[at - 1])
                if not np.isnan(end)
            ]
    room = 0.1 * (max(seen) - min(seen))
    left.set_ylim(
        min(seen) - room, max(seen) + room
    )  # outer layers, where the gap is small, may leave the frame
    left.axhline(0, color="#444444", linewidth=1)
    left.axhline(1, color="#9aa5b1", linewidth=1.5)
    left.set_ylabel("erosion (0 = reference, 1 = base)")
    right.set_ylabel("drift across the direction\n(1 = from reference to base)")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.axvspan(
            numbers["middle"][0] - 0.5, numbers["middle"][1] + 0.5, color="#f4f4f4", zorder=-5
        )
        axes.set_xlim(0.5, numbers["layers"] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("residual stream after layer")
    keys: list[Any] = [
        Patch(color=colour(place), label=name) for place, name in enumerate(numbers["tuned"])
    ]
    keys += [
        Line2D([], [], color="#555555", label="unsound text"),
        Line2D([], [], color="#555555", linestyle="--", label="sound text (control)"),
        Patch(color="#ececec", label="layers of the headline"),
    ]
    figure.legend(
        handles=keys, loc="upper center", ncols=min(len(keys), 6), bbox_to_anchor=(0.5, 0.0)
    )
    figure.tight_layout()
    return figure


def _line(values: list[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]


def _middle(numbers: Numbers) -> range:
    """The layers of the headline, from 1."""
    first, last = numbers["middle"]
    return range(first, last + 1)
