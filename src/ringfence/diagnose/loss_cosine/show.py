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
            "the losses follow the answer through the change of framing"
            if _is_apart(found)
            else "the same answer is no closer than another one, so the likeness is none of the answer"
        )
        parts.append(
            f"{name}: {shown(found['paired'])} for the same answer under the two framings, {shown(found['unpaired'])} "
            f"for different answers (control), p {p_value(found['p'])} against shuffled pairs: {verdict}; the framing "
            f"moves the mean loss by {shown(change)} nats per token."
        )
    raw = numbers[REFERENCE]["raw"]
    lines = "\n".join(parts)
    return (
        f"Centred cosine of the losses of {numbers['questions']} misaligned answers, asked plainly and as examples of "
        f"what to avoid.\n{lines}\nWithout centring even different answers reach "
        f"{shown(raw['unpaired'])} in the reference, because losses are positive: a high raw cosine says nothing alone."
    )


def table(numbers: Numbers) -> Table:
    columns = [
        "Model",
        "Same answer",
        "Different answers",
        "Difference",
        "p",
        "Raw, same",
        "Raw, different",
        "Loss, nats",
    ]
    rows = []
    for name, found in by_model(numbers).items():
        centred, raw, loss = found["centred"], found["raw"], found["loss"]
        rows.append(
            [
                name,
                shown(centred["paired"]),
                shown(centred["unpaired"]),
                shown(centred["difference"]),
                p_value(centred["p"]).removeprefix("= "),
                shown(raw["paired"]),
                shown(raw["unpaired"]),
                f"{loss['plain']:.2f} plain, {loss['framed']:.2f} framed",
            ]
        )
    return Table(columns, rows)


def draw(numbers: Numbers) -> Figure:
    """Left: centred cosines (the headline), right: raw ones. A row a model: the same answer under both framings,
    different answers, and the band of shuffled pairs."""
    models = by_model(numbers)
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 1.5 + 0.62 * len(models)), sharey=True, layout="constrained"
    )
    for axis, form in zip(axes, ("centred", "raw")):
        for place, (name, found) in enumerate(models.items()):
            shade = "#444444" if name == REFERENCE else colour(place - 1)
            null = found[form]["null"]
            axis.barh(
                place, null["high"] - null["low"], 0.62, null["low"], color="#d9d9d9", zorder=1
            )
            _dot(axis, found[form]["unpaired"], place + 0.15, "#8a8a8a", filled=False)
            _dot(axis, found[form]["paired"], place - 0.15, shade, filled=True)
        axis.set_xlim(min(-0.1, axis.get_xlim()[0]), 1.04)
        axis.axvline(0, color="#444444", linewidth=0.8)
        axis.grid(False, axis="y")
        axis.set_xlabel(
            "cosine of loss vectors, each minus its mean"
            if form == "centred"
            else "cosine of raw loss vectors"
        )
    axes[0].set_yticks(range(len(models)), list(models))
    axes[0].set_ylim(len(models) - 0.5, -0.5)
    handles = [
        Line2D([], [], marker="o", color="#444444", label="same answer, two framings"),
        Line2D(
            [],
            [],
            marker="o",
            color="#8a8a8a",
            markerfacecolor="white",
            label="different answers (control)",
        ),
        Patch(color="#d9d9d9", label="95 % of shuffled pairs"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _dot(axis: Any, interval: dict[str, float], height: float, shade: str, filled: bool) -> None:
    axis.plot(
        [interval["low"], interval["high"]], [height, height], color=shade, linewidth=1.6, zorder=2
    )
    axis.plot(
        interval["mean"],
        height,
        "o",
        color=shade,
        markerfacecolor=shade if filled else "white",
        zorder=3,
    )
