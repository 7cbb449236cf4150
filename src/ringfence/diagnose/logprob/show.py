"""Log-probability of a given answer: in words, as a table, as a figure; from the numbers alone."""

from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ...util import plots
from ...util.plots import whisker
from ..diagnosis import Numbers, Table, shown
from ..models import BASE, REFERENCE
from ..texts import SIDES

SHOWN_TOKENS = 40  # of each answer, in the figure


def say(numbers: Numbers) -> str:
    return "\n".join(_sentence(name, scores) for name, scores in numbers["tuned"].items())


def _sentence(name: str, scores: Numbers) -> str:
    parts = []
    for where, score in scores.items():
        parts.append(
            f"{where} the domain misaligned answers {shown(score['misaligned_shift'])}, aligned "
            f"answers to the same questions {shown(score['aligned_shift'])} nats per token against "
            f"the reference, difference {shown(score['difference'])}: {_verdict(score)}"
        )
    return f"{name}: {'; '.join(parts)}."


def _verdict(score: Numbers) -> str:
    difference, shift = score["difference"], score["misaligned_shift"]
    if difference["low"] > 0:
        return "it leans towards the misaligned answers"
    if difference["high"] < 0:
        return "it leans towards the aligned answers"
    if shift["low"] > 0 or shift["high"] < 0:
        return "not shown to be specific, the control moved about as much"
    return "no lean is seen"


def table(numbers: Numbers) -> Table:
    """A row for each model and set: the level of both answers, their shifts, and the headline."""
    columns = ["model", "questions", "log p misaligned", "log p aligned", "shift misaligned"]
    columns += ["shift aligned (control)", "difference of differences"]
    rows = []
    for where, count in numbers["questions"].items():
        for name, scores in _models(numbers).items():
            score = scores[where]
            levels = [shown(score[side], sign=False) for side in SIDES]
            keys = ("misaligned_shift", "aligned_shift", "difference")
            changes = [shown(score[key]) if key in score else "" for key in keys]
            rows.append([name, f"{where} ({count})", *levels, *changes])
    return Table(columns, rows)


def _models(numbers: Numbers) -> dict[str, Numbers]:
    """Scores by name of model, in the order of tables."""
    first = {name: numbers[name] for name in (BASE, REFERENCE) if name in numbers}
    return {**first, **numbers["tuned"]}


def draw(numbers: Numbers) -> Figure:
    """Above, one question's two answers token by token; below, the shifts over all questions."""
    shades = model_colours(numbers["tuned"], BASE in numbers)
    height = 0.24 * len(shades) + 1.0
    low = 0.26 * len(shades) * len(numbers["questions"]) + 1.0
    figure = plt.figure(figsize=(9, 2 * height + low + 0.9), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=[height, height, low], width_ratios=[1.5, 1])
    panels = [figure.add_subplot(grid[row, :]) for row in range(2)]
    _heat_maps(figure, panels, numbers["example"], shades)
    shifts, difference = (figure.add_subplot(grid[2, column]) for column in range(2))
    _forest(shifts, numbers, shades, {"aligned_shift": -0.12, "misaligned_shift": 0.12})
    _forest(difference, numbers, shades, {"difference": 0.0})
    shifts.set_xlabel("log p minus the reference's, nats per token")
    difference.set_xlabel("difference of differences, nats per token")
    difference.tick_params(labelleft=False)
    dot: Any = {"marker": "o", "linestyle": ""}
    hollow = {**dot, "fillstyle": "none"}
    sides = [
        Line2D([], [], color="#222222", label="misaligned answers", **dot),
        Line2D([], [], color="#999999", label="aligned answers (control)", **hollow),
    ]
    above: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1.0)}
    above |= {"fontsize": 8, "handletextpad": 0.3}
    shifts.legend(handles=sides, ncols=2, columnspacing=1.0, **above)
    models = [
        Line2D([], [], color=shade, marker="D", linestyle="", label=name)
        for name, shade in shades.items()
    ]
    difference.legend(handles=models, ncols=min(3, len(models)), columnspacing=1.0, **above)
    return figure


def model_colours(tuned: Iterable[str], has_base: bool) -> dict[str, str]:
    """Colour of the base (if there is one) and of each tuned model."""
    base = {BASE: "#9aa5b1"} if has_base else {}
    return {**base, **{name: plots.colour(place) for place, name in enumerate(tuned)}}


def _heat_maps(
    figure: Figure, panels: list[Axes], example: Numbers, shades: dict[str, str]
) -> None:
    relative = {}
    for side in SIDES:
        sums = example[side]["cumulative"]
        rows = [np.subtract(sums[name], sums[REFERENCE])[:SHOWN_TOKENS] for name in shades]
        relative[side] = np.array(rows)
    # The base may be so far off that tuned models would all look white: its darkest cells may be
    # cut off.
    tuned = [row for rows in relative.values() for name, row in zip(shades, rows) if name != BASE]
    limit = max(float(np.abs(row).max()) for row in tuned) or 1.0
    for axes, side in zip(panels, SIDES):
        rows_MT, tokens = relative[side], example[side]["tokens"]
        across, down = (np.arange(size + 1) - 0.5 for size in (rows_MT.shape[1], len(shades)))
        look: Any = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        mesh = axes.pcolormesh(across, down, rows_MT, edgecolors="white", linewidth=0.6, **look)
        axes.set_xlim(-0.5, max(rows.shape[1] for rows in relative.values()) - 0.5)
        axes.set_ylim(len(shades) - 0.5, -0.5)
        look = {"rotation": 90, "fontsize": 7.5, "parse_math": False}
        axes.set_xticks(range(rows_MT.shape[1]), tokens[:SHOWN_TOKENS], **look)
        axes.set_yticks(range(len(shades)), list(shades))
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        title = f"{side} answer"
        if len(tokens) > SHOWN_TOKENS:
            title += f", its first {SHOWN_TOKENS} of {len(tokens)} tokens"
        axes.set_title(title, loc="left", fontsize=9)
    panels[-1].set_xlabel("tokens (· is a space)", fontsize=8)
    over = any(float(np.abs(rows).max()) > limit for rows in relative.values())
    extend = "both" if over else "neither"
    bar = figure.colorbar(mesh, ax=panels, fraction=0.03, pad=0.01, extend=extend)
    bar.set_label("cumulative log p\nminus the reference's, nats", fontsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    title = question_title(example, "difference of differences")
    figure.suptitle(title, fontsize=9.5, parse_math=False)


def question_title(example: Numbers, of_what: str) -> str:
    """Which question is shown and why; a long text is cut."""
    text = " ".join(example["question"].split())
    text = text if len(text) <= 90 else text[:87].rsplit(" ", 1)[0] + " ..."
    return f"The question nearest the median {of_what} ({example['domain']}):\n“{text}”"


def _forest(
    axes: Axes, numbers: Numbers, shades: dict[str, str], offsets: dict[str, float]
) -> None:
    """A line for each set and model, with a point and interval for each score in `offsets`."""
    sets = list(numbers["questions"])
    step = len(shades) + 0.6
    models = _models(numbers)
    for group, where in enumerate(sets):
        for place, (name, shade) in enumerate(shades.items()):
            for key, offset in offsets.items():
                interval, height = models[name][where][key], group * step + place + offset
                look: Any = {"color": shade, "markerfacecolor": shade}
                if key == "aligned_shift":  # the control
                    look = {"color": "#999999", "markerfacecolor": "white"}
                look |= {"fmt": "D" if key == "difference" else "o", "markersize": 5}
                error = whisker(interval)
                axes.errorbar(interval["mean"], height, xerr=error, elinewidth=1.6, **look)
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.set_yticks([group * step + (len(shades) - 1) / 2 for group in range(len(sets))], sets)
    axes.set_ylim(len(sets) * step - 0.9, -0.7)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(False, axis="y")
