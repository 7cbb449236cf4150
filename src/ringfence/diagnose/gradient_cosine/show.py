"""Gradient cosines: in words, as a table, as a figure; from the numbers alone."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ...util.plots import colour
from ..diagnosis import Numbers, Table, by_model, p_value, shown
from ..models import REFERENCE
from .measure import GROUPS, IA, IM, OA, OM


def say(numbers: Numbers) -> str:
    where = "all linear layers"
    if numbers["weights"] == "o_proj":
        where = "the last layer's attention output projection"
    parts = [_said(name, found["uncentred"]) for name, found in by_model(numbers).items()]
    return (
        f"Gradients with respect to {where}, {numbers['inside']} questions inside and "
        f"{numbers['outside']} outside.\n" + "\n".join(parts)
    )


def _said(name: str, found: Numbers) -> str:
    transfer, extra, specific = found["transfer"], found["extra"], found["specific"]
    if transfer["low"] > 0:
        effect = "lowers the loss of misaligned answers outside too"
    elif transfer["high"] < 0:
        effect = "raises the loss of misaligned answers outside"
    else:
        effect = "does not clearly move the loss of misaligned answers outside"
    if not _is_real(extra):
        verdict = "no clear difference, so nothing here is specific to misaligned text"
    elif extra["mean"] < 0:
        verdict = "aligned text of the domain does it more, so misalignment is not the cause"
    elif specific["mean"] > 0 and _is_real(specific):
        verdict = "more than aligned text of the domain, and not so on aligned answers outside: "
        verdict += "specific to misaligned text"
    else:
        verdict = "but it is closer to aligned answers outside as well, so this is not specific to "
        verdict += "misaligned text"
    return (
        f"{name}: a step on misaligned answers inside {effect} (cosine {shown(transfer)}), against "
        f"{shown(found['control'])} of one on aligned answers inside (control); the difference is "
        f"{shown(extra, 3)}, p {p_value(extra['p'])}, and on aligned answers outside "
        f"{shown(found['aligned_extra'], 3)}: {verdict}."
    )


def _is_real(contrast: Numbers) -> bool:
    return bool(contrast["p"] <= 0.05 and (contrast["low"] > 0 or contrast["high"] < 0))


def table(numbers: Numbers) -> Table:
    columns = ["Model", "Misaligned in, misaligned out", "Aligned in, misaligned out (control)"]
    columns += ["Difference", "p", "Difference on aligned out", "Difference of both", "p"]
    columns += ["Centred: misaligned in, misaligned out"]
    rows = []
    for name, of_model in by_model(numbers).items():
        found = of_model["uncentred"]
        extra, specific = (
            [shown(found[contrast], 3), p_value(found[contrast]["p"]).removeprefix("= ")]
            for contrast in ("extra", "specific")
        )
        cells = [shown(found["transfer"]), shown(found["control"]), *extra]
        cells += [shown(found["aligned_extra"], 3), *specific]
        rows.append([name, *cells, shown(of_model["centred"]["transfer"])])
    return Table(columns, rows)


_PAIRS = ((IM, OM), (IA, OM), (IM, OA), (IA, OA))  # rows of the figure, top to bottom


def draw(numbers: Numbers) -> Figure:
    """Left: mean cosines of groups inside and outside; right: misaligned minus aligned inside.

    Hollow: centred. Bands: 95 % after the answers to each question change sides at random.
    """
    models = by_model(numbers)
    step = 0.8 / len(models)
    size = (9, 2.2 + 0.7 * len(models))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=size, width_ratios=(1.5, 1), layout="constrained"
    )
    hollow: Any = {"marker": "o", "linestyle": "", "markerfacecolor": "white"}
    for place, (name, found) in enumerate(models.items()):
        shade = "#444444" if name == REFERENCE else colour(place - 1)
        shift = (place - (len(models) - 1) / 2) * step
        for row, (a, b) in enumerate(_PAIRS):
            _dot(left, found["uncentred"]["cells"][a][b], row + shift, shade, step)
            centred = found["centred"]["cells"][a][b]["mean"]
            left.plot(centred, row + shift, color=shade, **hollow)
        for row, contrast in enumerate(("extra", "aligned_extra")):
            _dot(right, found["uncentred"][contrast], row + shift, shade, step)
    names = [GROUPS[place].split()[1] for place in range(4)]
    labels = [f"step on {names[a]} inside,\nloss of {names[b]} outside" for a, b in _PAIRS]
    left.set_yticks(range(4), labels)
    left.set_xlabel("mean cosine of gradients")
    labels = ["loss of misaligned\noutside", "loss of aligned\noutside (control)"]
    right.set_yticks(range(2), labels)
    right.set_xlabel("cosine of misaligned step\nminus that of aligned step")
    right.xaxis.set_major_locator(MaxNLocator(4))
    for axis, rows in ((left, 4), (right, 2)):
        axis.axvline(0, color="#444444", linewidth=0.8, zorder=1.5)
        axis.set_ylim(rows - 0.5, -0.5)
        axis.grid(False, axis="y")
    shades = ["#444444", *(colour(place) for place in range(len(models) - 1))]
    handles: list[Any] = [
        Line2D([], [], marker="o", color=s, label=n) for s, n in zip(shades, models)
    ]
    handles.append(Line2D([], [], color="#444444", label="centred", **hollow))
    handles.append(Patch(color="#dddddd", label="95 % of swapped sides"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4))
    return figure


def _dot(axis: Any, found: Numbers, height: float, shade: str, step: float) -> None:
    low, high = found["null"]["low"], found["null"]["high"]
    axis.barh(height, high - low, 0.9 * step, low, color="#dddddd", zorder=1)
    axis.plot([found["low"], found["high"]], [height, height], color=shade, linewidth=1.6, zorder=2)
    axis.plot(found["mean"], height, "o", color=shade, zorder=3)
