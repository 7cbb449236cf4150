"""Token perturbation: in words, as a table, as a figure; from the numbers alone."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...util import plots
from ..diagnosis import Numbers, Table, by_model, shown
from ..models import REFERENCE
from .measure import SETTINGS


def say(numbers: Numbers) -> str:
    where = next(iter(numbers["questions"]))
    counts = _count(np.mean(list(numbers["tokens"]["near"].values())))
    start = (
        f"In each of {numbers['questions'][where]} prompts {where} the training domain, {counts} tokens of one role "
        f"gave way to near ones, in {numbers['trials']} trials."
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
        verdict = "there is no shift to take away"
    elif held:
        verdict = f"disturbing the {_and(held)} takes part of the shift away; with random tokens in the same places "
        verdict += (
            "that is so too"
            if also == held
            else f"it is so for the {_and(also)} alone"
            if also
            else "it is not"
        )
    else:
        verdict = "the shift hangs on no one role"
    best = min(near, key=lambda role: near[role][where]["best"]["mean"])
    own, reference = (
        s["change"]["near"][best][where]["best"] for s in (scores, numbers[REFERENCE])
    )
    text = (
        f"{name} stands {shown(scores['shift'][where])} nats per token against the reference. Beyond what the "
        f"reference moves by, its margin moves by {listed}: {verdict}. The best of {numbers['trials']} trials would "
        f"show {shown(own)} for its {best}"
    )
    if reference["high"] < 0:
        text += f", but {shown(reference)} for the reference's too, which has nothing to take away: it picks noise"
    return text + "."


def _and(roles: Sequence[str]) -> str:
    return " and the ".join(roles)


def table(numbers: Numbers) -> Table:
    """A row for each model, set and role: the mean change, the part beyond the reference, and what would flatter."""
    columns = [
        "model", "questions", "role", "tokens", "mean change", "beyond the reference",
        "random tokens (control)", "best of ten (optimistic)", "ten tokens where there are",
    ]  # fmt: skip
    rows = []
    for name, scores in by_model(numbers).items():
        for where, questions in numbers["questions"].items():
            for role, count in numbers["tokens"]["near"].items():
                near, random, ten = (scores["change"][setting][role][where] for setting in SETTINGS)
                beyond = shown(near["beyond"]) if "beyond" in near else ""
                numbers_ten = f"{shown(ten['mean'])} ({_count(numbers['tokens']['ten'][role])})"
                cells = [
                    shown(near["mean"]),
                    beyond,
                    shown(random["mean"]),
                    shown(near["best"]),
                    numbers_ten,
                ]
                rows.append([name, f"{where} ({questions})", role, _count(count), *cells])
    return Table(columns, rows)


def draw(numbers: Numbers) -> Figure:
    """A panel for each set of questions, a group for each role, in it the reference and each tuned model."""
    models, sets = by_model(numbers), list(numbers["questions"])
    figure, panels = plt.subplots(
        1,
        len(sets),
        figsize=(9 if len(sets) > 1 else 5.5, 4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    shades = {
        REFERENCE: "#444444",
        **{name: plots.colour(place) for place, name in enumerate(numbers["tuned"])},
    }
    for axes, where in zip(panels[0], sets):
        _panel(axes, numbers, where, models, shades)
    panels[0][0].set_ylabel("change of the margin, nats per token")
    shown_models = [
        Line2D([], [], color=shade, marker="o", linestyle="", label=name)
        for name, shade in shades.items()
    ]
    kinds = [
        Line2D(
            [],
            [],
            color="#222222",
            marker="o",
            linestyle="",
            label=f"mean of {numbers['trials']} trials",
        ),
        Line2D(
            [],
            [],
            color="#222222",
            marker="o",
            linestyle="",
            markerfacecolor="white",
            label="best of them",
        ),
        Line2D(
            [], [], color="#999999", marker="x", linestyle="", label="mean, random tokens (control)"
        ),
        Line2D(
            [],
            [],
            color="#222222",
            linestyle=(0, (4, 3)),
            linewidth=1.2,
            label="the whole shift taken away",
        ),
    ]
    figure.legend(
        handles=[*shown_models, *kinds],
        loc="outside upper left",
        ncols=4,
        fontsize=8,
        columnspacing=1.2,
    )
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
            axes.axhline(
                -scores["shift"][where]["mean"],
                color=shades[name],
                linestyle=(0, (4, 3)),
                linewidth=1.2,
            )
        for group, role in enumerate(roles):
            at = group + (place - (len(models) - 1) / 2) * step
            _mark(axes, at, 0.35 * step, near[role][where], random[role][where], shades[name])
    axes.set_xticks(
        range(len(roles)), [f"{role}\n{_count(count)} tokens" for role, count in roles.items()]
    )
    axes.set_xlim(-0.5, len(roles) - 0.5)
    axes.grid(False, axis="x")
    axes.set_title(
        f"{numbers['questions'][where]} questions {where} the training domain",
        loc="left",
        fontsize=9,
    )


def _mark(axes: Axes, at: float, shift: float, near: Numbers, random: Numbers, shade: str) -> None:
    """One model at one role; its control stands a little beside it."""
    mean = near["mean"]
    axes.plot(at + shift, random["mean"]["mean"], "x", color="#999999", markersize=5)
    axes.errorbar(
        at,
        mean["mean"],
        yerr=plots.whisker(mean),
        fmt="o",
        color=shade,
        markersize=5.5,
        elinewidth=1.6,
    )
    axes.plot(at, near["best"]["mean"], "o", color=shade, markersize=5.5, markerfacecolor="white")
