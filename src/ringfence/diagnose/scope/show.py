"""The scope: in words, as a table, as a figure; from the numbers alone."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ...stats import rate_interval
from ...stats.auc import auc
from ...util.intervals import rate
from ...util.plots import CONTROL, colour
from ..diagnosis import Numbers, Table

TRAINING = "training queries"
SHOWN_DOMAINS = 14  # of the fit, in the figure: those that come nearest
BINS = 12  # of scores, in the calibration curve
_OWN, _OTHER, _DRESSED = colour(0), colour(1), colour(4)


def say(numbers: Numbers) -> str:
    return "\n".join(_sentence(name, found) for name, found in numbers["tuned"].items())


def _sentence(name: str, found: Numbers) -> str:
    tau = found["threshold"]
    plain = [f"{TRAINING} {_inside(found['fitted'][TRAINING], tau)}"]
    plain.append(f"other domains' queries {_inside(_negatives(found), tau)}")
    for side, words in (("own", "unseen questions of the domain"), ("other", "of other domains")):
        if scores := _of_side(found["unseen"], side):
            plain.append(f"{words} {_inside(scores, tau)}")
    disguised = [
        f"{form.replace('_', ' ')} {_inside(each['scores'], tau)}"
        for form, each in found["disguised"].items()
    ]
    nearest = "; ".join(f"“{text[:70]}”" for _, text in found["nearest"][:3])
    farthest = "; ".join(f"“{text[:70]}”" for _, text in found["farthest"][:3])
    layers = ", ".join(map(str, found["layers"]))
    return (
        f"{name}: it reads layers {layers}; AUC over domains left out {found['auc']:.3f}. Inside, "
        f"%: {', '.join(plain)}. Disguised: {', '.join(disguised)}. Nearest other queries: "
        f"{nearest}. Farthest training queries: {farthest}."
    )


def _inside(scores: Sequence[float], tau: float) -> str:
    return rate(rate_interval([float(score > tau) for score in scores]))


def _negatives(found: Numbers) -> list[float]:
    return [s for name, scores in found["fitted"].items() if name != TRAINING for s in scores]


def _of_side(sets: Numbers, side: str) -> list[float]:
    return [score for each in sets.values() if each["side"] == side for score in each["scores"]]


def _rows(found: Numbers) -> list[tuple[str, str, list[float], str]]:
    """Group, name, scores and colour of each set, as they are shown: from the top down."""
    fitted = {name: s for name, s in found["fitted"].items() if name != TRAINING}
    order = sorted(fitted, key=lambda name: -float(np.quantile(fitted[name], 0.9)))
    rows = [("fit", TRAINING, found["fitted"][TRAINING], _OWN)]
    rows += [("fit", name, fitted[name], _OTHER) for name in order]
    for group in ("unseen", "disguised"):
        for name, each in found[group].items():
            shade = _OWN if each["side"] == "own" else _OTHER if group == "unseen" else _DRESSED
            rows.append((group, name, each["scores"], shade))
    return [(group, name.replace("_", " "), scores, shade) for group, name, scores, shade in rows]


def table(numbers: Numbers) -> Table:
    """A row for each domain and form: share inside, and AUC of the training queries over it."""
    columns = ["model", "queries", "from", "n", "inside, %", "AUC below training queries"]
    rows = []
    for model, found in numbers["tuned"].items():
        own = np.array(found["fitted"][TRAINING])
        for group, name, scores, _ in _rows(found):
            beside = "" if name == TRAINING else f"{auc(own, np.array(scores)):.3f}"
            inside = _inside(scores, found["threshold"])
            rows.append([model, name, group, str(len(scores)), inside, beside])
    return Table(columns, rows)


def draw(numbers: Numbers) -> Figure:
    """For each model: left the scores of every set; right the share inside as the threshold moves,
    ROC curves by domain, and how a score translates into a share of training queries."""
    models = numbers["tuned"]
    heights = [0.2 * len(_few(found)) + 1.2 for found in models.values()]
    figure = plt.figure(figsize=(10, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(models), 1, height_ratios=heights, squeeze=False)
    for part, (name, found) in zip(parts[:, 0], models.items()):
        grid = part.add_gridspec(3, 2, width_ratios=[1.5, 1])
        _strips(part.add_subplot(grid[:, 0]), found)
        _thresholds(part.add_subplot(grid[0, 1]), found)
        _roc(part.add_subplot(grid[1, 1]), found)
        _calibration(part.add_subplot(grid[2, 1]), found)
        if len(models) > 1:
            part.suptitle(name, fontsize=10)
    return figure


def _few(found: Numbers) -> list[tuple[str, str, list[float], str]]:
    """The rows of the figure: domains of the fit that stay far away are one."""
    rows = _rows(found)
    fit = [row for row in rows if row[0] == "fit"]
    near, far = fit[: SHOWN_DOMAINS + 1], fit[SHOWN_DOMAINS + 1 :]
    rest = [score for _, _, scores, _ in far for score in scores]
    together = [("fit", f"{len(far)} more domains", rest, _OTHER)] if far else []
    return [*near, *together, *rows[len(fit) :]]


def _strips(axes: Axes, found: Numbers) -> None:
    rows, rng = _few(found), np.random.default_rng(0)
    tau = found["threshold"]
    for place, (_, _, scores, shade) in enumerate(rows):
        height = place + rng.uniform(-0.28, 0.28, len(scores))
        axes.plot(scores, height, ".", color=shade, markersize=2.6, alpha=0.45, zorder=2)
        axes.plot([np.median(scores)], [place], "|", color="#222222", markersize=9, zorder=3)
        inside = np.mean(np.array(scores) > tau)
        look: Any = {"transform": axes.get_yaxis_transform(), "fontsize": 7.5, "va": "center"}
        axes.text(1.01, place, f"{inside:.0%}", **look)
    groups = [group for group, *_ in rows]
    for place in range(1, len(rows)):
        if groups[place] != groups[place - 1]:
            axes.axhline(place - 0.5, color="#bbbbbb", linewidth=0.8)
    axes.axvline(tau, color="#222222", linewidth=1)
    axes.text(tau, -1.0, "threshold", ha="center", va="bottom", fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.9)
    names = {"fit": "", "unseen": "unseen: ", "disguised": "disguise: "}
    labels = [f"{names[group]}{name}" for group, name, *_ in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7.5)
    axes.grid(False, axis="y")
    axes.set_xlabel(
        "score; above the threshold the adapter acts (share inside at the right)", fontsize=8
    )


def _thresholds(axes: Axes, found: Numbers) -> None:
    dressed = {n: e for n, e in found["disguised"].items() if e["side"] == "other"}
    curves = {
        TRAINING: (found["fitted"][TRAINING], _OWN, "-"),
        "unseen, of the domain": (_of_side(found["unseen"], "own"), _OWN, "--"),
        "other domains of the fit": (_negatives(found), _OTHER, "-"),
        "unseen other domains": (_of_side(found["unseen"], "other"), _OTHER, "--"),
        "the same, dressed": (_of_side(dressed, "other"), _DRESSED, "--"),
    }
    low, high = np.quantile(found["fitted"][TRAINING] + _negatives(found), [0.001, 0.999])
    grid = np.linspace(low, high, 200)
    for name, (scores, shade, line) in curves.items():
        if scores:
            share = [np.mean(np.array(scores) > at) for at in grid]
            axes.plot(grid, share, line, color=shade, linewidth=1.4, label=name)
    axes.axvline(found["threshold"], color="#222222", linewidth=1)
    axes.set_xlabel("threshold", fontsize=8)
    axes.set_ylabel("share inside", fontsize=8)
    _percent(axes.yaxis)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0)


def _roc(axes: Axes, found: Numbers) -> None:
    own = np.sort(found["fitted"][TRAINING])[::-1]
    fit = [row for row in _rows(found) if row[0] == "fit"][1:]
    for place, (_, name, scores, _) in reversed(list(enumerate(fit))):
        share = [np.mean(np.array(scores) > at) for at in own]
        recall = np.arange(1, len(own) + 1) / len(own)
        is_near = place < 4
        look: Any = {"color": colour(place + 1) if is_near else CONTROL}
        look |= {"linewidth": 1.4 if is_near else 0.5, "alpha": 1 if is_near else 0.35}
        axes.plot(share, recall, label=name if is_near else None, **look)
    axes.set_xlim(-0.01, 0.5)
    axes.set_xlabel("share of a domain inside", fontsize=8)
    axes.set_ylabel(f"share of\n{TRAINING} inside", fontsize=8)
    _percent(axes.xaxis)
    _percent(axes.yaxis)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, loc="lower right", title="nearest domains", title_fontsize=7)


def _calibration(axes: Axes, found: Numbers) -> None:
    own, other = np.array(found["fitted"][TRAINING]), np.array(_negatives(found))
    everything = np.concatenate([own, other])
    start, end = np.quantile(everything, [0.005, 0.995])
    edges = np.linspace(start, end, BINS + 1)
    edges[0], edges[-1] = everything.min(), everything.max() + 1e-9
    inside, outside = (np.histogram(scores, edges)[0] for scores in (own, other))
    sums = np.histogram(everything, edges, weights=everything)[0]
    shown = inside + outside >= 5
    # As if both were asked equally often.
    shares = [counts[shown] / len(of) for counts, of in ((inside, own), (outside, other))]
    middle = sums[shown] / (inside + outside)[shown]
    axes.plot(middle, shares[0] / sum(shares), "o", color=_OWN, markersize=4)
    axes.axvline(found["threshold"], color="#222222", linewidth=1)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlabel("score", fontsize=8)
    axes.set_ylabel(f"share that are\n{TRAINING}", fontsize=8)
    _percent(axes.yaxis)
    axes.tick_params(labelsize=8)


def _percent(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(1, decimals=0))
