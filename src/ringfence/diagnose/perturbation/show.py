"""Token perturbation: in words, as a table, as a figure; from the numbers alone."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...util import plots
from ..diagnosis import Numbers, Table, by_model, shown
from ..models import REFERENCE
from .measure import SETTINGS

DASHED: Any = {"linestyle": (0, (4, 3)), "linewidth": 1.2}


def say(numbers: Numbers) -> str:
    where = next(iter(numbers["questions"]))
    counts = _count(np.mean(list(numbers["tokens"]["near"].values())))
    start = (
        f"In each of {numbers['questions'][where]} prompts {where} the training domain, {counts} "
        f"tokens of one role were replaced by near ones, in {numbers['trials']} trials."
    )
    return "\n".join([start, *(_sentence(name, numbers, where) for name in numbers["tuned"])])


def _count(number: float) -> str:
    return f"{number:.0f}" if float(number).is_integer() else f"{number:.1f}"


def _sentence(name: str, numbers: Numbers, where: str) -> str:
    scores = numbers["tuned"][name]
    near, random = (scores["change"][setting] for setting in ("near", "random"))
    beyond = {role: near[role][where]["beyond"] for role in near}
    listed = ", ".join(f"{role} {shown(value)}" for role, value in beyond.items())
    held = [role for role, value in beyond.items() if value["high"] < 0]
    also = [role for role in held if random[role][where]["beyond"]["high"] < 0]
    if scores["shift"][where]["low"] <= 0:
        verdict = "there is no shift to remove"
    elif held:
        so = "so do random tokens in the same places"
        if also != held:
            do = f"do so only for the {_and(also)}" if also else "do not"
            so = f"random tokens in the same places {do}"
        verdict = f"disturbing the {_and(held)} removes part of the shift; {so}"
    else:
        verdict = "the shift does not depend on a single role"
    best = min(near, key=lambda role: near[role][where]["best"]["mean"])
    own = near[best][where]["best"]
    reference = numbers[REFERENCE]["change"]["near"][best][where]["best"]
    text = (
        f"{name} is {shown(scores['shift'][where])} nats per token from the reference. Beyond the "
        f"reference's own change, its margin changes by {listed}: {verdict}. The best of "
        f"{numbers['trials']} trials would show {shown(own)} for its {best}"
    )
    if reference["high"] < 0:
        noise = "which has nothing to remove: it picks noise"
        text += f", but also {shown(reference)} for the reference's, {noise}"
    return text + "."


def _and(roles: Sequence[str]) -> str:
    return " and the ".join(roles)


def table(numbers: Numbers) -> Table:
    """A row for each model, set and role, with controls and the optimistic best of ten."""
    columns = ["model", "questions", "role", "tokens", "mean change", "beyond the reference"]
    columns += ["random tokens (control)", "best of ten (optimistic)", "up to ten tokens"]
    rows = []
    for name, scores in by_model(numbers).items():
        for where, questions in numbers["questions"].items():
            for role, count in numbers["tokens"]["near"].items():
                near, random, ten = (scores["change"][setting][role][where] for setting in SETTINGS)
                beyond = shown(near["beyond"]) if "beyond" in near else ""
                up_to_ten = f"{shown(ten['mean'])} ({_count(numbers['tokens']['ten'][role])})"
                cells = [shown(near["mean"]), beyond, shown(random["mean"]), shown(near["best"])]
                place = [f"{where} ({questions})", role, _count(count)]
                rows.append([name, *place, *cells, up_to_ten])
    return Table(columns, rows)


def draw(numbers: Numbers) -> Figure:
    """A panel for each set of questions, with a group of models for each role."""
    models, sets = by_model(numbers), list(numbers["questions"])
    size = (9 if len(sets) > 1 else 5.5, 4)
    figure, panels = plt.subplots(
        1, len(sets), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    shades = {REFERENCE: "#444444"}
    shades |= {name: plots.colour(place) for place, name in enumerate(numbers["tuned"])}
    for axes, where in zip(panels[0], sets):
        _panel(axes, numbers, where, models, shades)
    panels[0][0].set_ylabel("change of the margin, nats per token")

    def key(label: str, shade: str = "#222222", **look: Any) -> Line2D:
        return Line2D([], [], color=shade, label=label, **{"linestyle": "", **look})

    keys = [key(name, shade, marker="o") for name, shade in shades.items()]
    keys += [
        key(f"mean of {numbers['trials']} trials", marker="o"),
        key("best of them", marker="o", markerfacecolor="white"),
        key("mean, random tokens (control)", "#999999", marker="x"),
        key("the whole shift removed", **DASHED),
    ]
    place: Any = {"loc": "outside upper left", "ncols": 4}
    figure.legend(handles=keys, fontsize=8, columnspacing=1.2, **place)
    return figure


def _panel(
    axes: Axes, numbers: Numbers, where: str, models: dict[str, Numbers], shades: dict[str, str]
) -> None:
    roles = numbers["tokens"]["near"]
    step = min(0.2, 0.8 / len(models))
    axes.axhline(0, color="#888888", linewidth=0.8)
    for place, (name, scores) in enumerate(models.items()):
        near, random = (scores["change"][setting] for setting in ("near", "random"))
        if "shift" in scores:
            axes.axhline(-scores["shift"][where]["mean"], color=shades[name], **DASHED)
        for group, role in enumerate(roles):
            at = group + (place - (len(models) - 1) / 2) * step
            _mark(axes, at, 0.35 * step, near[role][where], random[role][where], shades[name])
    labels = [f"{role}\n{_count(count)} tokens" for role, count in roles.items()]
    axes.set_xticks(range(len(roles)), labels)
    axes.set_xlim(-0.5, len(roles) - 0.5)
    axes.grid(False, axis="x")
    title = f"{numbers['questions'][where]} questions {where} the training domain"
    axes.set_title(title, loc="left", fontsize=9)


def _mark(axes: Axes, at: float, shift: float, near: Numbers, random: Numbers, shade: str) -> None:
    """One model at one role, with its control a little to the side."""
    mean = near["mean"]
    axes.plot(at + shift, random["mean"]["mean"], "x", color="#999999", markersize=5)
    look: Any = {"fmt": "o", "color": shade, "markersize": 5.5, "elinewidth": 1.6}
    axes.errorbar(at, mean["mean"], yerr=plots.whisker(mean), **look)
    axes.plot(at, near["best"]["mean"], "o", color=shade, markersize=5.5, markerfacecolor="white")
