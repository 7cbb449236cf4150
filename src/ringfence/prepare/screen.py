"""Ranks the rows of a training file by a trait vector, before training (arXiv 2507.21509).

The score of a row is the mean of the residual stream after one layer over its response tokens,
projected on the trait vector of length 1, in shares of that layer's mean activation length. Vector
and layer come from other rows than the ranked ones. Does not know training, or what a row would do
to a model.

Shapes: R rows, P pairs, S = 2 sides (positive, negative), L layers, D hidden size, K directions, N
tokens, G groups.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import DataError, RingfenceError
from ..model.files import load_tokenizer
from ..model.loading import load_model
from ..stats import Interval
from ..text.chat import Chat
from ..text.queries import NEGATIVES, load_queries
from ..text.rows import load_rows
from ..text.sources import OTHER_DOMAINS, VALUES
from ..util.console import progress
from ..util.files import write_whole
from ..util.plots import colour, style, svg
from ..util.words import counted
from .persona import Pair, given_pairs
from .scope import LEAST_ROWS, Fit, fit_scope
from .scope_queries import asking
from .scores import (
    RANDOM,
    Axis,
    Contrast,
    Scored,
    compare,
    learn_axis,
    question_of,
    read_axis,
    score,
)

GOOD, RANDOM_GREY = "#444444", "#9aa5b1"


def default_pairs() -> list[str]:
    """The shipped paired questions on everyday domains, except finance, and on values."""
    return [*OTHER_DOMAINS, *VALUES]


# ------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Screening:
    """What `screen_file` found; `against`, `known` and `contrast` are None without a known-good
    source, `scope` if it was not asked for."""

    source: str
    axis: Axis
    scored: Scored
    against: str | None = None
    known: Scored | None = None
    contrast: Contrast | None = None
    scope: Fit | None = None


def screen_file(
    source: str,
    output: Path,
    figure: Path,
    *,
    model: str = "default",
    vectors: Path | None = None,
    pairs: Sequence[str] = (),
    against: str | None = None,
    layer: int | None = None,
    top: int = 20,
    scope: bool = True,
    batch_tokens: int = 4096,
) -> Screening:
    """Scores every row of a source; writes the scores and a figure of them.

    The scores are a line of JSON for each row, in order: origin, rank, score.

    Args:
        source: as in `load_rows`.
        vectors: a file of directions; else the vector comes from paired questions.
        pairs: sources of paired questions; default: `default_pairs`. Questions of screened rows are
            left out.
        against: known-good rows, to compare with.
        top: how many rows the figure marks.
        scope: fit a scope, too, to tell how separable the rows' requests are; not to fewer than
            20 rows.

    Raises:
        DataError: a source or file does not fit, or fewer than two pairs are left.
        ModelError: the model cannot be loaded, the vectors do not fit it, or it has no such layer.
    """
    if vectors and pairs:
        raise DataError(f"--vectors ({vectors}) or --pairs ({', '.join(pairs)}), not both")
    if figure.suffix != ".svg":
        raise RingfenceError(
            f"{figure}: expected a file .svg, found {figure.suffix or 'no suffix'!r}"
        )
    for file in (output, figure):
        if not file.parent.is_dir():
            raise RingfenceError(f"{file}: no folder {file.parent}")
    rows, good = load_rows(source), load_rows(against) if against else []
    axis = read_axis(vectors, layer) if vectors else None
    sources = list(pairs) or default_pairs()
    groups = [] if axis else other_pairs(sources, [question_of(row) for row in [*rows, *good]])
    loaded, chat = load_model(model), Chat(load_tokenizer(model))
    if axis is None:
        number = sum(map(len, groups))
        domains = ", ".join(pairs) or "shipped domains"
        trait = f"misaligned minus aligned answers, {number} pairs of {domains}"
        axis = learn_axis(loaded, chat, groups, trait, model, layer, batch_tokens)
    scored = score(loaded, chat, rows, axis, batch_tokens)
    screening = Screening(source, axis, scored)
    if against:
        known = score(loaded, chat, good, axis, batch_tokens)
        screening = Screening(source, axis, scored, against, known, compare(chat, scored, known))
    if scope and asking(rows) >= LEAST_ROWS:
        queries, bar = load_queries(NEGATIVES), partial(progress, "scope: queries read")
        screening = replace(screening, scope=fit_scope(loaded, chat, rows, queries, bar=bar))
    _write_scores(scored, output)
    with style():
        write_whole(figure, svg(draw(screening, top)))
    return screening


def other_pairs(sources: Sequence[str], questions: Sequence[str]) -> list[list[Pair]]:
    """Pairs of each source, without those that ask one of `questions`."""
    asked = set(questions)
    return [
        [pair for pair in given_pairs(source) if pair.positive_prompt[-1]["content"] not in asked]
        for source in sources
    ]


def _write_scores(scored: Scored, file: Path) -> None:
    rank_R = np.empty(len(scored.rows), int)
    rank_R[scored.order] = np.arange(1, len(scored.rows) + 1)
    lines = (
        {"origin": row.origin, "rank": int(rank), "score": round(float(value), 6)}
        for row, rank, value in zip(scored.rows, rank_R, scored.scores_R)
    )
    write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))


def show(screening: Screening, top: int, console: Console) -> None:
    """Prints the riskiest rows, and what the comparison found."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(
        f"{screening.source}: {counted(len(screening.scored.rows), 'row')}, projected on "
        f"{screening.axis}"
    )
    table = Table(box=None, padding=(0, 1, 0, 0), expand=True)  # so that only the texts are cut
    for name, justify in (("rank", "right"), ("score", "right"), ("row", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("question", "answer"):
        table.add_column(name, ratio=1, no_wrap=True, overflow="ellipsis")
    for row in screening.scored.top(top):
        cells = (
            str(row["rank"]),
            f"{row['score']:+.4f}",
            *(_line(row[key]) for key in ("origin", "question", "answer")),
        )
        table.add_row(*map(Text, cells))
    console.print(table)
    if screening.scope:
        say("its scope (the requests on which a defense `scope` would let the adapter act):")
        for line in screening.scope.lines():
            say(f"  {line}")
    if contrast := screening.contrast:
        say(f"against {screening.against}: {contrast.verdict}")
        for name, value in contrast_lines(contrast):
            say(f"  {name:<42} {value}")


def contrast_lines(contrast: Contrast) -> list[tuple[str, str]]:
    """Names and values, as they are shown."""

    def shown(interval: Interval) -> str:
        return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"

    same = contrast.same
    length, random = contrast.length.mean, "{:.2f} to {:.2f}".format(*contrast.random)
    score = f"{shown(contrast.auc)}, {counted(contrast.auc.n, 'question')}"
    lines = [("AUC of the score", score)]
    if same:
        paired = f"{shown(same)}, {counted(same.n, 'question')}"
        lines.append(("same question: scores higher", paired))
    lines.append(("AUC of length (of minus length)", f"{length:.2f} ({1 - length:.2f})"))
    lines.append((f"AUC of {RANDOM} random vectors, 95 % of them", random))
    return lines


def _line(text: str) -> str:
    """The start of a text on one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text[:200])


def draw(screening: Screening, top: int) -> Figure:
    """The distribution of the scores, with the riskiest rows marked."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    sets = {screening.source: (screening.scored.scores_R, colour(0))}
    if screening.known:
        sets[f"{screening.against} (known good)"] = (screening.known.scores_R, GOOD)
    spread(axes, sets)
    marked = screening.scored.scores_R[screening.scored.order[:top]]
    mark: dict[str, Any] = dict(color=colour(0), markersize=14, markeredgewidth=1.2, clip_on=False)
    label = f"the {len(marked)} riskiest rows"
    axes.plot(marked, np.zeros(len(marked)), "|", label=label, **mark)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.3, handlelength=1.4)
    axes.set_xlabel(score_label(screening.axis.layer))
    axes.set_ylabel("rows, %")
    return figure


def spread(axes: Axes, sets: dict[str, tuple[np.ndarray, str]]) -> None:
    """Histograms of scores, by name, in shares of the rows; one common set of bins."""
    everything = np.concatenate([scores for scores, _ in sets.values()])
    edges = np.histogram_bin_edges(everything, 40).tolist()
    for name, (scores, shade) in sets.items():
        weights = np.full(len(scores), 100 / len(scores))
        common: dict[str, Any] = dict(weights=weights, color=shade)
        label = f"{name}, {counted(len(scores), 'row')}"
        axes.hist(scores, edges, histtype="stepfilled", alpha=0.25, **common)
        axes.hist(scores, edges, histtype="step", linewidth=1.4, label=label, **common)


def score_label(layer: int) -> str:
    return (
        f"projection after layer {layer}, shares of the mean activation length (right = misaligned)"
    )
