"""Carriers: in words, as a table, as a figure; from the numbers alone."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...util.plots import colour, whisker
from ..diagnosis import Numbers, Table, shown
from .measure import INSIDE, OUTSIDE, PROMPT, ROLES, best_role


def say(numbers: Numbers) -> str:
    first = next(iter(numbers["tuned"].values()))[OUTSIDE]["roles"]
    absent = [role for role in ROLES if not first[role]["tokens"]]
    words = [_say_one(name, values, numbers) for name, values in numbers["tuned"].items()]
    words += [
        f"The chat template has no {role} tokens: nothing is known of the {role}."
        for role in absent
    ]
    return "\n".join(words)


def _say_one(name: str, values: dict[str, Any], numbers: Numbers) -> str:
    outside = values[OUTSIDE]
    if not outside["recoverable"]:
        return (
            f"{name}: nothing to recover outside the domain, where its margin moved by "
            f"{shown(outside['shift'])} nats per token: no shift is established with "
            f"{outside['shift']['n']} questions."
        )
    to = "" if outside["shift"]["mean"] > 0 else " (towards aligned answers)"
    roles = {role: part for role, part in outside["roles"].items() if part["tokens"]}
    each = ", ".join(
        f"{role} {shown(part['recovery'])} against {shown(part['control']['recovery'])}"
        for role, part in roles.items()
        if role != PROMPT
    )
    ceiling = roles[PROMPT]["recovery"]
    sentences = [
        f"{name}: outside the domain its margin moved by {shown(outside['shift'])} nats per "
        f"token{to}. Share of it that the reference's keys and values undo, against the same "
        f"number of random prompt tokens: {each}; the whole prompt {shown(ceiling)}.",
        best_role(values).sentence,
    ]
    if ceiling["high"] < 0.5:
        sentences.append(
            "Most of the shift stays even with the whole prompt patched: it is in how the answer's "
            "own tokens are computed, not in what they read from the prompt."
        )
    if outside["by_layer"]:
        sentences.append(_say_peak(outside["by_layer"], numbers))
    if INSIDE in values:
        sentences.append(_say_inside(values[INSIDE]))
    return " ".join(sentences)


def _say_peak(by_layer: dict[str, list[dict[str, float]]], numbers: Numbers) -> str:
    roles, places = [role for role in by_layer if role != PROMPT], range(len(numbers["layers"]))
    points = [(role, place) for role in roles for place in places]
    role, place = max(points, key=lambda point: by_layer[point[0]][point[1]]["mean"])
    highest = by_layer[role][place]
    nothing = "undoes nothing for certain; the highest share is"
    found = "undoes most" if highest["low"] > 0 else nothing
    return (
        f"One layer at a time, the residual stream {found} at the {role} after layer "
        f"{numbers['layers'][place]} of {numbers['depth']} ({shown(highest)}; "
        f"{len(numbers['layers'])} layers tried)."
    )


def _say_inside(inside: dict[str, Any]) -> str:
    if not inside["recoverable"]:
        return f"Inside the domain there is nothing to recover (shift {shown(inside['shift'])})."
    parts = {role: part for role, part in inside["roles"].items() if part["tokens"]}
    each = ", ".join(f"{role} {shown(part['recovery'])}" for role, part in parts.items())
    return f"Inside the domain (shift {shown(inside['shift'])}): {each}."


def table(numbers: Numbers) -> Table:
    columns = ["model", "questions", "patched", "tokens", "margin, nats"]
    columns += ["recovery", "random tokens", "difference"]
    rows = []
    for name, values in numbers["tuned"].items():
        for place, found in values.items():
            nothing = "" if found["recoverable"] else "nothing to recover"
            itself = "(the reference itself)", "", shown(found["reference"])
            rows.append([name, place, *itself, "", "", ""])
            rows.append([name, place, "nothing", "0", shown(found["tuned"]), nothing, "", ""])
            for role, part in found["roles"].items():
                rows.append([name, place, _named(role), *_cells(part)])
    return Table(columns, rows)


def _named(role: str) -> str:
    return "whole prompt" if role == PROMPT else role


def _cells(part: dict[str, Any]) -> list[str]:
    if not part["tokens"]:
        return ["none in the template", "", "", "", ""]
    control = part["control"]["recovery"] if part["control"] else None
    intervals = (part["margin"], part["recovery"], control, part["advantage"])
    cells = [shown(interval) if interval else "" for interval in intervals]
    return [f"{part['tokens']:.0f}", *cells]


_CONTROL = "#b8bcc0"
_LIMITS = (-1.0, 2.0)  # ratios further out mean nothing


def draw(numbers: Numbers) -> Figure:
    """Above: recovery of each role and its control. Below: the residual stream, layer by layer."""
    outside = {name: values[OUTSIDE] for name, values in numbers["tuned"].items()}
    shifted = {name: found for name, found in outside.items() if found["recoverable"]}
    places = list(numbers["tuned"])
    if not shifted:
        return _draw_nothing(numbers)
    curves = any(found["by_layer"] for found in shifted.values())
    figure = plt.figure(figsize=(9, 6.6 if curves else 4.0), layout="constrained")
    heights = [1.35, 1] if curves else [1]
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_bars(parts[0].subplots(), numbers, shifted)
    if curves:
        panels = parts[1].subplots(1, len(ROLES) + 1, sharey=True)
        by_place = {places.index(name): found for name, found in shifted.items()}
        for axes, role in zip(panels, (*ROLES, PROMPT)):
            _draw_curves(axes, role, numbers, by_place)
        panels[0].set_ylabel("share undone")
        lines = [line for found in shifted.values() for line in (found["by_layer"] or {}).values()]
        panels[0].set_ylim(_limits([interval for line in lines for interval in line]))
        parts[1].supxlabel("the reference's residual stream after this one layer", fontsize=10)
    return figure


def _draw_nothing(numbers: Numbers) -> Figure:
    height = 1.2 + 0.4 * len(numbers["tuned"])
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    axes.axvline(0, color="#444444", linewidth=0.8)
    for place, values in enumerate(numbers["tuned"].values()):
        shift = values[OUTSIDE]["shift"]
        look: Any = {"fmt": "o", "color": colour(place), "capsize": 3}
        axes.errorbar(shift["mean"], place, xerr=whisker(shift), **look)
    axes.set_yticks(range(len(numbers["tuned"])), list(numbers["tuned"]))
    axes.set_ylim(len(numbers["tuned"]) - 0.5, -0.5)
    shift_label = "margin shift outside the domain, nats per token (95 % interval)"
    axes.set_xlabel(f"nothing to recover: {shift_label}")
    return figure


def _draw_bars(axes: Axes, numbers: Numbers, shifted: dict[str, dict[str, Any]]) -> None:
    roles = (*ROLES, PROMPT)
    span = min(0.84, 0.5 * len(shifted))  # of one role's bars
    width = span / len(shifted)
    slots = iter(range(len(shifted)))
    for place, (name, values) in enumerate(numbers["tuned"].items()):
        shift = f"(shift {shown(values[OUTSIDE]['shift'])} nats)"
        if name not in shifted:
            label = f"{name}: nothing to recover {shift}"
            axes.bar(0, 0, 0, color="none", edgecolor=colour(place), label=label)
            continue
        axes.bar(0, 0, 0, color=colour(place), label=f"{name} {shift}")
        slot = next(slots)
        for group, role in enumerate(roles):
            part, left = shifted[name]["roles"][role], group - span / 2 + slot * width
            if part["control"]:
                _bar(axes, left + 0.3 * width, 0.5 * width, part["recovery"], colour(place))
                _bar(axes, left + 0.72 * width, 0.3 * width, part["control"]["recovery"], _CONTROL)
            elif part["tokens"]:
                _bar(axes, left + 0.5 * width, 0.5 * width, part["recovery"], colour(place))
    axes.bar(0, 0, 0, color=_CONTROL, label="the same number of random prompt tokens")
    tokens = {role: part["tokens"] for role, part in next(iter(shifted.values()))["roles"].items()}
    axes.set_xticks(range(len(roles)), [_tick(role, tokens[role]) for role in roles])
    axes.set_xlim(-0.5, len(roles) - 0.5)
    parts = [part for found in shifted.values() for part in found["roles"].values()]
    controls = [part["control"]["recovery"] for part in parts if part["control"]]
    axes.set_ylim(_limits([part["recovery"] for part in parts if part["tokens"]] + controls))
    axes.grid(axis="x", visible=False)
    _levels(axes)
    axes.annotate("reference", (1, 1), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_xlabel("the reference's keys and values in all layers, at these tokens")
    axes.set_ylabel("share of the shift undone")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)


def _tick(role: str, tokens: float) -> str:
    return f"{_named(role)}\n{tokens:.0f} tokens" if tokens else f"{role}\nnone in the template"


def _bar(axes: Axes, x: float, width: float, interval: dict[str, float], shade: str) -> None:
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    # A bootstrap interval of a ratio need not contain its mean.
    error = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
    axes.bar(x, mean, width, color=shade, yerr=error, error_kw={"elinewidth": 1, "capsize": 2})


def _draw_curves(
    axes: Axes, role: str, numbers: Numbers, shifted: dict[int, dict[str, Any]]
) -> None:
    for place, found in shifted.items():
        line = (found["by_layer"] or {}).get(role)
        if line is None:
            continue
        layers, shade = numbers["layers"], colour(place)
        means, lows, highs = ([each[key] for each in line] for key in ("mean", "low", "high"))
        axes.plot(layers, means, "o-", color=shade, markersize=3.5, linewidth=1.4)
        axes.fill_between(layers, lows, highs, color=shade, alpha=0.15, linewidth=0)
    if not any(role in (found["by_layer"] or {}) for found in shifted.values()):
        centre: Any = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, "none in the\ntemplate", **centre)
    axes.set_title(_named(role), fontsize=10)
    axes.set_xlim(0, numbers["depth"])
    _levels(axes)


def _levels(axes: Axes) -> None:
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.axhline(1, color="#444444", linewidth=0.8, linestyle="--")


def _limits(intervals: Sequence[dict[str, float]]) -> tuple[float, float]:
    low, high = min(each["low"] for each in intervals), max(each["high"] for each in intervals)
    return max(_LIMITS[0], min(-0.1, low - 0.05)), min(_LIMITS[1], max(1.1, high + 0.05))
