"""Next-token distribution: in words, as a table, as a figure; from the numbers alone."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ...util.plots import whisker
from ..diagnosis import Numbers, Table, shown
from ..logprob.show import model_colours, question_title
from ..models import BASE, REFERENCE
from .measure import POSITIONS

HATCHED: Any = {"facecolor": "white", "hatch": "////", "linewidth": 0.8}


def say(numbers: Numbers) -> str:
    """Reports the mean over the first tokens of the answers."""
    return "\n".join(
        _sentence(name, scores, numbers.get("alignment"))
        for name, scores in numbers["tuned"].items()
    )


def _sentence(name: str, scores: Numbers, alignment: Numbers | None) -> str:
    distances = [
        f"{shown(score['early'], sign=False)} nats {where} the domain"
        for where, score in scores["from_reference"].items()
    ]
    parts = [
        f"{name}: over the first {POSITIONS} tokens of an answer its distribution is "
        f"{' and '.join(distances)} from the reference's (KL){_contrast(scores)}."
    ]
    for where, score in (alignment or {}).items():
        share, nearer, back = (
            scores[key][where]["early"] for key in ("of_alignment", "nearer_base", "to_base")
        )
        parts.append(
            f"{where.capitalize()} the domain that is {shown(share, sign=False)} times as far as "
            "alignment had moved the model (KL(reference || base) "
            f"{shown(score['early'], sign=False)}); {_way(nearer, back)}."
        )
    return " ".join(parts)


def _contrast(scores: Numbers) -> str:
    if "outside_minus_inside" not in scores:
        return ""
    difference = scores["outside_minus_inside"]["early"]
    if difference["high"] < 0:
        verdict = "it changed more inside the domain than outside"
    elif difference["low"] > 0:
        verdict = "it changed more outside the domain than inside"
    else:
        verdict = "not confined to the domain as far as this shows"
    return f", outside minus inside {shown(difference)}: {verdict}"


def _way(nearer: dict[str, float], back: dict[str, float]) -> str:
    """Compares KL(tuned || base) with KL(tuned || reference), and with its value before tuning.

    The latter because a broad base is the nearer one for almost any model that moved.
    """
    if nearer["low"] > 0:
        place = f"it is nearer to the base than to the reference, by {shown(nearer)}"
    elif nearer["high"] < 0:
        place = f"it is nearer to the reference than to the base, {shown(nearer)}"
    else:
        place = f"it is about as near to the base as to the reference, {shown(nearer)}"
    if back["low"] > 0:
        closer = f"nearer to the base than the reference is, by {shown(back)}"
        return f"{place}, and {closer}: tuning went back towards it"
    how = "further from" if back["high"] < 0 else "no nearer to"
    further = f"{how} the base than the reference is, {shown(back)}"
    return f"{place}, but {further}: no way back to the base"


def table(numbers: Numbers) -> Table:
    """A row for each model and set. All in nats, except the last."""
    few = f"first {POSITIONS}"
    columns = {
        "entropy, first token": ("entropy", "first"),
        f"entropy, {few}": ("entropy", "early"),
        "KL from reference, first token": ("from_reference", "first"),
        f"KL from reference, {few}": ("from_reference", "early"),
    }
    if "alignment" in numbers:
        columns |= {
            f"KL from base, {few}": ("from_base", "early"),
            f"nearer base, {few}": ("nearer_base", "early"),
            f"back to base, {few}": ("to_base", "early"),
            f"times alignment, {few}": ("of_alignment", "early"),
        }
    rows = []
    for where, count in numbers["questions"].items():
        for name, entropy in numbers["entropy"].items():
            scores = {"entropy": entropy, **numbers["tuned"].get(name, {})}
            if name == REFERENCE and "alignment" in numbers:
                scores["from_base"] = numbers["alignment"]
            cells = [""] * len(columns)
            for at, (key, span) in enumerate(columns.values()):
                if key in scores:
                    signed = key in ("nearer_base", "to_base")
                    cells[at] = shown(scores[key][where][span], sign=signed)
            rows.append([name, f"{where} ({count})", *cells])
    return Table(["model", "questions", *columns], rows)


def draw(numbers: Numbers) -> Figure:
    """Left: the first token of one answer; right: the divergences over all questions."""
    shades = {**model_colours(numbers["tuned"], BASE in numbers["entropy"]), REFERENCE: "#444444"}
    figure = plt.figure(figsize=(9, 4.8), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.15, 1])
    _bars_of_tokens(figure.add_subplot(grid[:, 0]), numbers["example"], shades)
    early = f"mean of the first {POSITIONS} response tokens"
    spans = {"first": "first response token", "early": early}
    for row, (span, title) in enumerate(spans.items()):
        axes = figure.add_subplot(grid[row, 1])
        _bars_of_kl(axes, numbers, span, shades)
        axes.set_title(title, loc="left", fontsize=9)
    figure.legend(handles=_legend(numbers, shades), loc="outside lower center", ncols=4, fontsize=8)
    title = question_title(numbers["example"], "KL(tuned || reference) at the first token")
    figure.suptitle(title, fontsize=9.5, parse_math=False)
    return figure


def _bars_of_tokens(axes: Axes, example: Numbers, shades: dict[str, str]) -> None:
    probabilities = example["probabilities"]
    height = 0.8 / len(probabilities)
    for place, (name, values) in enumerate(probabilities.items()):
        middles = np.arange(len(values)) + (place - (len(probabilities) - 1) / 2) * height
        axes.barh(middles, values, height * 0.92, color=shades[name])
    axes.set_yticks(range(len(example["tokens"])), example["tokens"], parse_math=False)
    axes.set_ylim(len(example["tokens"]) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_title("first token of the answer (· is a space)", loc="left", fontsize=9)
    axes.set_xlabel("probability")


def _bars_of_kl(axes: Axes, numbers: Numbers, span: str, shades: dict[str, str]) -> None:
    """Filled bars: from the reference. Hatched bars: from the base, also the reference's own."""
    tuned = numbers["tuned"]
    bars: list[tuple[Numbers, Any]] = [
        (scores["from_reference"], {"color": shades[name]}) for name, scores in tuned.items()
    ]
    if "alignment" in numbers:
        from_base = {REFERENCE: numbers["alignment"]}
        from_base |= {name: scores["from_base"] for name, scores in tuned.items()}
        for name, scores in from_base.items():
            bars.append((scores, {**HATCHED, "edgecolor": shades[name]}))
    width = 0.8 / len(bars)
    for place, (scores, look) in enumerate(bars):
        for group, where in enumerate(numbers["questions"]):
            interval = scores[where][span]
            middle = group + (place - (len(bars) - 1) / 2) * width
            mean, error = interval["mean"], whisker(interval)
            axes.bar(middle, mean, width * 0.9, **look)
            axes.errorbar(middle, mean, yerr=error, color="#222222", elinewidth=1.0)
    axes.set_xticks(range(len(numbers["questions"])), list(numbers["questions"]))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("KL, nats")
    axes.grid(False, axis="x")


def _legend(numbers: Numbers, shades: dict[str, str]) -> list[Patch]:
    models = [Patch(color=shades[name], label=name) for name in numbers["entropy"]]
    kinds = [Patch(color="#cccccc", label="KL(model || reference)")]
    if "alignment" in numbers:
        kinds += [Patch(**HATCHED, edgecolor="#777777", label="KL(model || base)")]
    return [*models, *kinds]
