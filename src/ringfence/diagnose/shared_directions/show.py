"""Shared directions: in words, as a table, as a figure; from the numbers alone."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ...util.plots import colour
from ..diagnosis import Numbers, Table, shown
from ..texts import SIDES
from .measure import EDITS

WORDS = {
    "taken_out": "taking out the top direction from base to reference",
    "added": "adding a step along it",
}


def say(numbers: Numbers) -> str:
    """See `Showing`."""
    sets = "{inside} inside and {outside} outside questions".format(**numbers["questions"])
    text = (
        f"After layer {numbers['layer']} of {numbers['layers']}, over {sets}.\n"
        f"From base to reference: {_told(numbers['alignment'])}"
    )
    for name, found in numbers["tuned"].items():
        edits = "; ".join(f"{WORDS[edit]} {_effect(found['causal'][edit])}" for edit in EDITS)
        text += (
            f"\nFrom the reference to {name}: {_told(found['change'])} In {name}, whose margin "
            f"outside the domain is {shown(found['causal']['shift'])} from the reference's (nats "
            f"per token), {edits}."
        )
    return text


def _told(shared: Numbers) -> str:
    misaligned, aligned = (shared[side] for side in SIDES)
    return (
        "the top directions inside and outside have cosine "
        f"{misaligned['cosine']:.2f} on misaligned answers and {aligned['cosine']:.2f} on aligned "
        f"ones (difference: p = {shared['difference']['sides']['cosine']['p']:.2g}; exchanged "
        f"pairs {_band(misaligned['pairs'])}, exchanged sets {_band(misaligned['sets'])}): "
        f"{verdict(shared)}."
    )


def _band(exchanged: Numbers) -> str:
    return "{low:.2f} to {high:.2f}".format(**exchanged["cosine"])


def verdict(shared: Numbers) -> str:
    """What the exchanges show about the top directions."""
    difference = shared["difference"]
    if shared["misaligned"]["pairs"]["cosine"]["p"] > 0.05:
        return "no more alike than unrelated changes in this stream"
    if difference["sides"]["cosine"]["p"] > 0.05:
        return "shared, but not specific to misaligned text"
    if difference["cosine"] > 0:
        return "shared, and more so on misaligned text"
    return "shared, but more so on aligned text"


def _effect(effect: Numbers) -> str:
    verdict = "no more than random directions do"
    if is_beyond(effect):
        side = "misaligned" if effect["change"]["mean"] > 0 else "aligned"
        verdict = f"beyond chance, towards the {side} answers"
    chance = "{low:+.2f} to {high:+.2f}".format(**effect["chance"])
    return f"moved the margin by {shown(effect['change'])} (random directions {chance}): {verdict}"


def is_beyond(effect: Numbers) -> bool:
    """Whether an edit moved the margin beyond random directions and variation of questions."""
    is_outside = not effect["chance"]["low"] <= effect["change"]["mean"] <= effect["chance"]["high"]
    return is_outside and not effect["beyond"]["low"] <= 0 <= effect["beyond"]["high"]


def table(numbers: Numbers) -> Table:
    """See `Showing`."""

    def cells(shared: Numbers) -> list[str]:
        misaligned, aligned = (shared[side] for side in SIDES)
        return [
            f"{misaligned['cosine']:.2f}",
            f"{aligned['cosine']:.2f}",
            f"{shared['difference']['sides']['cosine']['p']:.2g}",
            _band(misaligned["pairs"]),
            _band(misaligned["sets"]),
            ", ".join(f"{angle:.0f}" for angle in misaligned["angles"]),
            f"{misaligned['mean_cosine']:.2f} / {aligned['mean_cosine']:.2f}",
        ]

    rows = [["base to reference", *cells(numbers["alignment"]), "", ""]]
    for name, found in numbers["tuned"].items():
        edits = [shown(found["causal"][edit]["change"]) for edit in EDITS]
        rows.append([f"reference to {name}", *cells(found["change"]), *edits])
    columns = ["change", "cosine, misaligned", "cosine, aligned (control)", "p of the difference"]
    columns += ["exchanged pairs", "exchanged sets", "principal angles, degrees"]
    columns += ["mean changes, misaligned / aligned", "margin, direction taken out"]
    return Table([*columns, "margin, step added"], rows)


def draw(numbers: Numbers) -> Figure:
    """Left: cosines of top directions; middle: of top subspaces; right: margins after edits."""
    changes = {"base to\nreference": numbers["alignment"]}
    changes |= {
        f"reference to\n{name}": found["change"] for name, found in numbers["tuned"].items()
    }
    size = (10.5, 0.85 * len(changes) + 1.6)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=size, width_ratios=[1, 1, 1.1], layout="constrained"
    )
    for axes, score in ((left, "cosine"), (middle, "subspace")):
        for row, shared in enumerate(changes.values()):
            _dots(axes, row, shared, score, "#444444" if row == 0 else colour(row - 1))
        axes.set_ylim(len(changes) - 0.45, -0.55)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    left.set_yticks(range(len(changes)), list(changes))
    middle.set_yticks(range(len(changes)), [])
    left.set_xlabel("|cosine| of the top directions,\ninside against outside")
    middle.set_xlabel(f"mean cosine of principal angles,\ntop {numbers['subspace']} directions")
    _bars(right, numbers)
    figure.legend(handles=_keys(), loc="outside lower center", ncols=3)
    return figure


def _dots(axes: Axes, row: int, shared: Numbers, score: str, shade: str) -> None:
    for side, height, fill in zip(SIDES, (row - 0.17, row + 0.17), (shade, "white")):
        for exchange, tone, width in (("pairs", "#e2e2e2", 0.26), ("sets", "#a9a9a9", 0.1)):
            band = shared[side][exchange][score]
            axes.barh(height, band["high"] - band["low"], width, band["low"], color=tone, zorder=2)
        look: Any = {"color": shade, "markerfacecolor": fill, "markersize": 7, "zorder": 3}
        axes.plot(shared[side][score], height, "o", **look)


def _bars(axes: Axes, numbers: Numbers) -> None:
    labels = []
    for place, (name, found) in enumerate(numbers["tuned"].items()):
        for number, edit in enumerate(EDITS):
            height, effect = 2 * place + number, found["causal"][edit]
            change = effect["change"]
            ends = [[change["mean"] - change["low"]], [change["high"] - change["mean"]]]
            bar: Any = {"color": colour(place), "alpha": 0.45 if number else 0.8, "zorder": 2}
            axes.barh(height, change["mean"], 0.5, **bar)
            axes.errorbar(change["mean"], height, xerr=ends, color="black", linewidth=1.2, zorder=3)
            heights = [height + 0.36] * len(effect["random"])
            axes.plot(effect["random"], heights, "|", color="#777777", markersize=6, zorder=3)
            labels.append(f"{name}: {edit.replace('_', ' ')}")
    axes.axvline(0, color="#444444", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel("change of the margin outside,\nnats per token (right = misaligned)")


def _keys() -> list[Any]:
    def dot(label: str, **look: Any) -> Line2D:
        return Line2D([], [], color="#444444", linestyle="", label=label, **look)

    return [
        dot("misaligned answers", marker="o"),
        dot("aligned answers (control)", marker="o", markerfacecolor="white"),
        Patch(color="#e2e2e2", label="pairs exchanged: unrelated changes"),
        Patch(color="#a9a9a9", label="sets exchanged: two sets of one kind"),
        dot("random directions of the same size", marker="|"),
    ]
