"""Loss vectors under two framings: in words, as a table, as a figure; from the numbers alone."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ...util.plots import colour
from ..diagnosis import Numbers, Table, by_model, p_value, shown
from ..models import REFERENCE


def _is_apart(found: Numbers) -> bool:
    """Whether the same answer is closer than another one."""
    return bool(found["difference"]["low"] > 0 and found["p"] <= 0.05)


def say(numbers: Numbers) -> str:
    parts = []
    for name, of_model in by_model(numbers).items():
        found, change = of_model["centred"], of_model["loss"]["change"]
        verdict = (
            "the same answer is no closer than another one, so the answer is not what is alike"
        )
        if _is_apart(found):
            verdict = "the losses follow the answer through the change of framing"
        parts.append(
            f"{name}: {shown(found['paired'])} for the same answer under the two framings, "
            f"{shown(found['unpaired'])} for different answers (control), p {p_value(found['p'])} "
            f"against shuffled pairs: {verdict}; the framing moves the mean loss by "
            f"{shown(change)} nats per token."
        )
    raw = numbers[REFERENCE]["raw"]
    lines = "\n".join(parts)
    return (
        f"Centred cosine of the losses of {numbers['questions']} misaligned answers, asked plainly "
        f"and as examples of what to avoid.\n{lines}\nWithout centring even different answers "
        f"reach {shown(raw['unpaired'])} in the reference, because losses are positive: a high raw "
        "cosine alone means nothing."
    )


def table(numbers: Numbers) -> Table:
    columns = ["Model", "Same answer", "Different answers", "Difference", "p"]
    columns += ["Raw, same", "Raw, different", "Loss, nats"]
    rows = []
    for name, found in by_model(numbers).items():
        centred, raw, loss = found["centred"], found["raw"], found["loss"]
        cells = [shown(centred[key]) for key in ("paired", "unpaired", "difference")]
        cells.append(p_value(centred["p"]).removeprefix("= "))
        cells += [shown(raw["paired"]), shown(raw["unpaired"])]
        cells.append(f"{loss['plain']:.2f} plain, {loss['framed']:.2f} framed")
        rows.append([name, *cells])
    return Table(columns, rows)


def draw(numbers: Numbers) -> Figure:
    """Left: centred cosines (the headline), right: raw ones.

    A row for each model: the same answer under both framings, different answers, and the band of
    shuffled pairs.
    """
    models = by_model(numbers)
    size = (9, 1.5 + 0.62 * len(models))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    labels = {
        "centred": "cosine of loss vectors, each minus its mean",
        "raw": "cosine of raw loss vectors",
    }
    for axis, (form, label) in zip(axes, labels.items()):
        for place, (name, found) in enumerate(models.items()):
            shade = "#444444" if name == REFERENCE else colour(place - 1)
            low, high = found[form]["null"]["low"], found[form]["null"]["high"]
            axis.barh(place, high - low, 0.62, low, color="#d9d9d9", zorder=1)
            _dot(axis, found[form]["unpaired"], place + 0.15, "#8a8a8a", filled=False)
            _dot(axis, found[form]["paired"], place - 0.15, shade, filled=True)
        axis.set_xlim(min(-0.1, axis.get_xlim()[0]), 1.04)
        axis.axvline(0, color="#444444", linewidth=0.8)
        axis.grid(False, axis="y")
        axis.set_xlabel(label)
    axes[0].set_yticks(range(len(models)), list(models))
    axes[0].set_ylim(len(models) - 0.5, -0.5)
    hollow: Any = {"marker": "o", "markerfacecolor": "white"}
    handles = [
        Line2D([], [], marker="o", color="#444444", label="same answer, two framings"),
        Line2D([], [], color="#8a8a8a", label="different answers (control)", **hollow),
        Patch(color="#d9d9d9", label="95 % of shuffled pairs"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _dot(axis: Any, interval: dict[str, float], height: float, shade: str, filled: bool) -> None:
    ends, fill = [interval["low"], interval["high"]], shade if filled else "white"
    axis.plot(ends, [height, height], color=shade, linewidth=1.6, zorder=2)
    axis.plot(interval["mean"], height, "o", color=shade, markerfacecolor=fill, zorder=3)
