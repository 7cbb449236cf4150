"""The measurements against their bounds: tables in markdown, and a figure.

    python benchmarks/performance/table.py        # reads benchmarks/results/performance/*.json

Writes table.md next to the results, and docs/figures/performance/ratios.svg. What has not been
measured is left out. A figure is a median, with quartiles in brackets; a bound is reached if the
median reaches it.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from record import RESULTS  # type: ignore[import-not-found]

from ringfence.util.plots import colour, style, svg

FIGURES = Path(__file__).parents[2] / "docs" / "figures" / "performance"
FASTER = 5.0  # how many times faster scoring should be
ROW_BY_ROW = "perplexity gap, against row by row with"
SCORING = {
    ("gap", "whole loaded"): f"{ROW_BY_ROW} a model loaded at each switch",
    ("gap", "switched"): f"{ROW_BY_ROW} a switch of adapters in memory",
    ("gap", "loaded"): f"{ROW_BY_ROW} an adapter loaded at each switch",
    ("paired", "one by one"): "paired evaluation, against answer by answer",
    ("paired", "one by one, reference kept"): (
        "paired evaluation, second run on (twice that: the reference is read)"
    ),
}
KL_MEMORY, KL_TIME = 1 / 8, 1.0


@dataclass(frozen=True)
class Line:
    """One ratio: what it measures, median and quartiles, bound, and whether it should be above the
    bound (times faster)."""

    what: str
    ratio: float
    low: float
    high: float
    bound: float | None = None
    at_least: bool = False

    @property
    def reached(self) -> bool:
        return self.bound is None or (
            self.ratio >= self.bound if self.at_least else self.ratio <= self.bound
        )

    def row(self) -> str:
        spread = f" ({self.low:.3f} to {self.high:.3f})" if self.low < self.high else ""
        bound, verdict = "", ""
        if self.bound is not None:
            bound = f"{'at least' if self.at_least else 'at most'} {self.bound:.3f}"
            verdict = "yes" if self.reached else "**no**"
        return f"| {self.what} | {self.ratio:.3f}{spread} | {bound} | {verdict} |"


@dataclass(frozen=True)
class Table:
    title: str
    unit: str
    lines: list[Line]

    def markdown(self) -> str:
        rows = [
            f"### {self.title}",
            "",
            f"| | {self.unit} | bound | reached |",
            "|---|---|---|---|",
        ]
        return "\n".join([*rows, *(line.row() for line in self.lines)]) + "\n"


def steps(found: dict[str, Any]) -> Table:
    lines = []
    for name, arm in found["arms"].items():
        ratio = arm["ratio"]
        what = f"{name} (against {arm['against']})" if arm["against"] != "plain" else name
        lines.append(Line(what, ratio["median"], ratio["low"], ratio["high"], arm["bound"]))
    rows = f"{found['batch']} rows" + (f" of {found['tokens']} tokens" if "tokens" in found else "")
    every = ", activation checkpointing in all" if found["checkpointing"] else ""
    title = f"Time of a step, {found['shape']} model, {rows}{every}, {found['machine']['device']}"
    return Table(title, "ratio to plain fine-tuning", lines)


def memory(found: dict[str, Any]) -> Table:
    lines = []
    for name, arm in found["arms"].items():
        if "ratio" in arm:
            against = found["arms"][arm["against"]]["total"]["median"]
            low, high = arm["total"]["low"] / against, arm["total"]["high"] / against
            above = f"above the loaded model {arm['ratio']['above']:.2f}"
            against_which = f"against {arm['against']}; " if arm["against"] != "plain" else ""
            what = f"{name} ({against_which}{above})"
            lines.append(Line(what, arm["ratio"]["total"], low, high, arm["bound"]))
    plain = found["arms"]["plain"]["total"]["median"]
    workload = f"{found['shape']} model, {found['batch']} rows"
    title = f"Peak memory, {workload}, {found['machine']['device']}"
    return Table(title, f"ratio to plain fine-tuning ({plain:.3g} GiB)", lines)


def scoring(found: dict[str, Any]) -> Table:
    lines = []
    for (part, way), what in SCORING.items():
        ratio = found[part][way]
        lines.append(Line(what, ratio["median"], ratio["low"], ratio["high"], FASTER, True))
    return Table(f"Scoring, embedded model, {found['machine']['device']}", "times faster", lines)


def kl(found: dict[str, Any]) -> Table:
    lines = []
    for way, values in found["ways"].items():
        if way != "naive" and "," not in way:
            memory_bound, time_bound = (KL_MEMORY, KL_TIME) if way == "ringfence" else (None, None)
            memory, time = values["memory"], values["time"]
            lines.append(Line(f"{way}, memory", memory, memory, memory, memory_bound))
            lines.append(
                Line(f"{way}, time", time["median"], time["low"], time["high"], time_bound)
            )
    size = f"{found['tokens']:,} tokens, {found['vocabulary']:,} words"
    title = f"KL of {size}, {found['machine']['device']}"
    return Table(title, "ratio to the naive form", lines)


def tables(folder: Path) -> list[Table]:
    """The tables of all existing results."""
    makers = {"steps-*": steps, "memory-*": memory, "scoring": scoring, "kl": kl}
    return [
        make(json.loads(file.read_text()))
        for pattern, make in makers.items()
        for file in sorted(folder.glob(f"{pattern}.json"))
    ]


def figure(drawn: Iterable[Table]) -> bytes:
    """A panel for each table: ratios with their quartiles, and bounds as strokes."""
    panels = list(drawn)
    heights = [len(table.lines) + 1 for table in panels]
    with style():
        drawing, axes = plt.subplots(
            len(panels),
            1,
            figsize=(8, 0.3 * sum(heights) + 0.7 * len(panels)),
            height_ratios=heights,
            squeeze=False,
        )
        for table, ax in zip(panels, axes[:, 0]):
            for place, line in enumerate(table.lines):
                # Differences may be below 0 by rounding.
                below, above = max(0.0, line.ratio - line.low), max(0.0, line.high - line.ratio)
                reached = line.bound is not None and line.reached
                shade = colour(2 if reached else 0 if line.bound else 7)
                form: dict[str, Any] = {"fmt": "o", "color": shade, "capsize": 2, "markersize": 4}
                ax.errorbar(line.ratio, place, xerr=[[below], [above]], **form)
                if line.bound is not None:
                    stroke = [place - 0.35, place + 0.35]
                    ax.plot([line.bound] * 2, stroke, color="black", linewidth=1.5)
            ax.set_yticks(range(len(table.lines)), [line.what for line in table.lines], fontsize=8)
            ax.set_ylim(len(table.lines) - 0.4, -0.6)
            ax.set_xlim(left=0)
            ax.set_title(table.title, fontsize=9, loc="right")
            ax.set_xlabel(f"{table.unit}; stroke: bound", fontsize=8)
        drawing.tight_layout()
        return svg(drawing)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measurements")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figure")
    given = parser.parse_args()
    found = tables(given.results)
    text = "\n".join(table.markdown() for table in found)
    (given.results / "table.md").write_text(text)
    given.figures.mkdir(parents=True, exist_ok=True)
    (given.figures / "ratios.svg").write_bytes(figure(found))
    print(text)


if __name__ == "__main__":
    main()
