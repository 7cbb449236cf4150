"""One look for all figures: colours, style, SVG. Imports no torch."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

COLOURS = ("#b3261e", "#1f5fa8", "#2e7d32", "#8e44ad", "#c77700", "#00798c", "#6d4c41", "#546e7a")
CONTROL = "#707070"
_STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # names may hold $
    "svg.hashsalt": "ringfence",
}


@contextmanager
def style() -> Iterator[None]:
    """Figures made in this context have the house's look."""
    with plt.rc_context(_STYLE):
        yield


def colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def whisker(interval: Mapping[str, float]) -> list[list[float]] | None:
    """How far an interval reaches below and above its mean, in the form of errorbar; None for a
    single cluster."""
    below, above = interval["mean"] - interval["low"], interval["high"] - interval["mean"]
    if interval["n"] <= 1:
        return None
    return [[max(0.0, below)], [max(0.0, above)]]  # of equal values, below 0 by rounding


def svg(figure: Figure, cut: bool = True) -> bytes:
    """The figure as SVG, cut to what is drawn or at its given width; it is closed."""
    buffer = io.BytesIO()
    box = "tight" if cut else None
    figure.savefig(buffer, format="svg", bbox_inches=box, metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()
