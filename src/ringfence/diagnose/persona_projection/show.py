"""Persona projection of the rows: in words, as a table, as a figure; from the numbers alone."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...prepare.screen import GOOD, RANDOM_GREY, score_label, spread
from ...util.plots import colour, whisker
from ..diagnosis import Numbers, Table, shown

MISALIGNED = "#c77700"  # its colour


def say(numbers: Numbers) -> str:
    axis, sets = numbers["axis"], numbers["sets"]
    known, training, misaligned = numbers["known"], sets["training"], sets["misaligned"]
    works = misaligned["rival"] is None
    leaning = (
        f"as {len(numbers['scores']['aligned'])} questions do not show that the scores work, this "
        "says little"
    )
    if works:
        leaning = _leaning(training)
    parts = [
        f"On held-out questions {known} the training domain, the vector of layer {axis['layer']} "
        f"gives misaligned answers an AUC of {_auc(misaligned)} over aligned ones: "
        f"{misaligned['verdict']}.",
        f"Training rows have {_auc(training)} over the same aligned answers, and "
        f"{_share(training)} of them are above 95 % of those (of misaligned answers "
        f"{_share(misaligned)}); {leaning}.",
    ]
    if works:
        parts.append("Riskiest: " + ", ".join(row["origin"] for row in numbers["top"][:3]) + ".")
    parts += [f"{name} {_moved(found)}." for name, found in numbers["tuned"].items()]
    return "\n".join(parts)


def _leaning(training: Numbers) -> str:
    if training["auc"]["high"] < 0.5:
        return "they lean the other way"
    if training["auc"]["low"] <= 0.5:
        return "they do not lean towards misaligned answers"
    but = f", but {training['verdict']}" if training["rival"] else ""
    return f"they lean towards misaligned answers{but}"


def _moved(found: dict[str, Numbers]) -> str:
    return "; ".join(
        f"{_along(part)} on answers {where} ({shown(part['shift'], 4)}, random vectors "
        f"{_band(part['random'], '+.4f')})"
        for where, part in found.items()
    )


def _along(part: Numbers) -> str:
    shift, (low, high) = part["shift"], part["random"]
    if shift["low"] <= 0 <= shift["high"]:
        return "has not moved"
    if low <= shift["mean"] <= high:
        return "moved no further than random vectors show"
    return f"moved {'towards' if shift['mean'] > 0 else 'away from'} misaligned answers"


def _auc(found: Numbers) -> str:
    return shown(found["auc"], sign=False)


def _share(found: Numbers) -> str:
    above = found["above"]
    return f"{above['mean']:.0%} [{above['low']:.0%}, {above['high']:.0%}]"


def _band(ends: Sequence[float], form: str = ".2f") -> str:
    return f"{ends[0]:{form}} to {ends[1]:{form}}"


def table(numbers: Numbers) -> Table:
    names = {
        "training": f"{numbers['rows']} training rows",
        "misaligned": f"misaligned answers {numbers['known']}",
    }
    rows = []
    for name, label in names.items():
        found = numbers["sets"][name]
        cells = [_auc(found), _band(found["random"]), f"{found['length']['mean']:.2f}"]
        rows.append([f"{label}: AUC over aligned", *cells])
        rows.append([f"{label}: above 95 % of aligned", _share(found), "", ""])
    for name, parts in numbers["tuned"].items():
        for where, part in parts.items():
            shift, band = shown(part["shift"], 4), _band(part["random"], "+.4f")
            rows.append([f"{name}: shift of the score, {where}", shift, band, ""])
    return Table(["", "trait vector", "random vectors", "length"], rows)


def draw(numbers: Numbers) -> Figure:
    figure, axes = plt.subplot_mosaic(
        [["rows", "tuned"], ["known", "tuned"]],
        figsize=(11, 4.4),
        width_ratios=[1.5, 1],
        height_ratios=[3, 1.1],
    )
    _draw_rows(axes["rows"], axes["known"], numbers)
    _draw_shifts(axes["tuned"], numbers["tuned"])
    figure.tight_layout()
    return figure


def _draw_rows(rows: Axes, known: Axes, numbers: Numbers) -> None:
    """The training rows as a histogram, and below it the held-out answers, point by point."""
    scores = {name: np.array(values) for name, values in numbers["scores"].items()}
    spread(rows, {"training": (scores["training"], colour(0))})
    line: Any = {"color": GOOD, "linewidth": 1, "linestyle": "--"}
    rows.axvline(numbers["threshold"], label="95 % of aligned answers", **line)
    known.axvline(numbers["threshold"], **line)
    for height, (side, shade) in enumerate({"misaligned": MISALIGNED, "aligned": GOOD}.items()):
        heights = np.full(len(scores[side]), height)
        known.plot(scores[side], heights, "|", color=shade, markersize=13)
    known.set_yticks([0, 1], [f"misaligned, {numbers['known']}", f"aligned, {numbers['known']}"])
    known.set_ylim(-0.6, 1.6)
    known.grid(False, axis="y")
    known.sharex(rows)
    rows.tick_params(labelbottom=False)
    rows.set_ylabel("training rows, %")
    rows.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.3)
    known.set_xlabel(score_label(numbers["axis"]["layer"]))


def _draw_shifts(axes: Axes, tuned: dict[str, Any]) -> None:
    """Shifts of tuned models, inside (filled) and outside (open), on bands of random vectors."""
    lines = [(name, where, part) for name, parts in tuned.items() for where, part in parts.items()]
    for height, (name, where, part) in enumerate(lines):
        shade, shift = colour(list(tuned).index(name)), part["shift"]
        low, high = part["random"]
        axes.barh(height, high - low, 0.6, low, color=RANDOM_GREY, alpha=0.5)
        filled = shade if where == "inside" else "white"
        look: Any = {"fmt": "o", "color": shade, "mfc": filled, "capsize": 2, "elinewidth": 1.6}
        axes.errorbar(shift["mean"], height, xerr=whisker(shift), **look)
    axes.axvline(0, color=GOOD, linewidth=0.8)
    axes.set_yticks(range(len(lines)), [f"{name}, {where}" for name, where, _ in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("shift of the score of held-out answers\n(grey: 95 % of random vectors)")
