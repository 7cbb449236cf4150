"""Ranks the rows of a training file by how far their answers lie along a trait vector, before anything is trained
(arXiv 2507.21509).

The score of a row is the mean of the residual stream after one layer over its response tokens, projected on the trait
vector of length 1, in shares of that layer's mean activation length. Vector and layer come from other rows than those
that are ranked. Does not know training, nor what a row would do to a model.

Shapes: R rows, P pairs, S = 2 sides (positive, negative), L layers, D hidden size, K directions, N tokens, G groups.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..errors import DataError, ModelError, RingfenceError
from ..evaluate.config import EvaluateConfig
from ..model.directions import Directions
from ..model.files import load_tokenizer
from ..model.loading import load_model
from ..model.taps import causal_lm
from ..runfolder.folder import write_whole
from ..stats import Interval, auc, auc_interval, rate_interval
from ..text.chat import Chat
from ..text.roles import Row
from ..text.rows import encode_rows, load_rows
from ..util.console import progress
from ..util.plots import colour, style, svg
from ..util.words import counted
from .persona import Pair, given_pairs, response_means

RANDOM = 100  # vectors that a trait vector is compared with
FOLDS = 5  # of pairs that all come from one source
GOOD, RANDOM_GREY = "#444444", "#9aa5b1"


def default_pairs() -> list[str]:
    """The shipped paired questions of everyday domains and on values, other than finance."""
    config = EvaluateConfig()
    return [*config.out_of_domain, *config.values]


# ------------------------------------------------------------------ what rows are projected on


@dataclass(frozen=True)
class Axis:
    """A trait vector at one layer.

    Attributes:
        unit_D: of length 1, float64.
        norm: mean length of a token's activation after the layer: the unit of scores.
        layer: from 1 to `layers`.
        trait, model: what the vector points to, and the model it was taken from.
        rule: how the layer was chosen, in words.
        auc: AUC at the layer on pairs that had no part in the vector (see `held_out_auc`); None where the pairs are not
            known.
    """

    unit_D: Tensor
    norm: float
    layer: int
    layers: int
    trait: str
    model: str
    rule: str
    auc: float | None = None

    def __str__(self) -> str:
        held_out = "" if self.auc is None else f", AUC {self.auc:.2f} on pairs left out"
        return f"{self.trait} ({self.model}), layer {self.layer} of {self.layers} ({self.rule}{held_out})"


def read_axis(file: Path, layer: int | None = None) -> Axis:
    """The trait vector of a file of directions, at `layer` or at the middle layer.

    Raises:
        DataError: the file cannot be read, or holds several directions a layer.
        ModelError: there is no such layer.
    """
    directions = Directions.load(file)
    number = directions.directions_LKD.shape[1]
    if number != 1:
        raise DataError(f"{file}: expected one direction a layer, found {number}")
    rule = "as given" if layer else "the middle one"
    return _axis(directions, _checked(layer, directions.layers) or (directions.layers + 1) // 2, rule)


def learn_axis(
    model: Any,
    chat: Chat,
    groups: Sequence[Sequence[Pair]],
    trait: str,
    model_name: str,
    layer: int | None = None,
    batch_tokens: int = 4096,
) -> Axis:
    """The trait vector of pairs (mean over positive answers minus mean over negative ones, as in `persona.extract`), at
    `layer` or where vectors of the other groups tell the answers of a group apart best.

    Two passes over the pairs: one for the sums of each group, one for the projections of its answers on the vector of
    the others. So no activation is kept, and memory does not grow with the number of pairs but for one number an answer
    and layer.

    Args:
        groups: pairs of one domain each; of one group alone, `FOLDS` are made.

    Raises:
        DataError: fewer than two pairs.
        ModelError: there is no such layer.
    """
    config = causal_lm(model).config.get_text_config()
    _checked(layer, config.num_hidden_layers)
    groups = [group for group in groups if group]
    if len(groups) == 1:
        groups = [groups[0][fold::FOLDS] for fold in range(min(FOLDS, len(groups[0])))]
    pairs = [pair for group in groups for pair in group]
    if len(pairs) < 2:
        raise DataError(f"{trait}: {counted(len(pairs), 'pair')} left for a trait vector; at least 2 are needed")
    rows = [row for pair in pairs for row in pair.rows]
    group_R = torch.tensor([number for number, group in enumerate(groups) for _ in range(2 * len(group))])
    layers, width = config.num_hidden_layers, config.hidden_size
    sums_GSLD = torch.zeros(len(groups), 2, layers, width, dtype=torch.float64)
    norms_L = torch.zeros(layers, dtype=torch.float64)
    projected_RL = torch.zeros(len(rows), layers, dtype=torch.float64)
    with progress("trait vector", 2 * len(rows)) as advance:
        for places, means_BLD, norms_BL in response_means(model, chat, rows, batch_tokens, advance):
            sums_GSLD.index_put_((group_R[places], torch.tensor(places) % 2), means_BLD.double(), accumulate=True)
            norms_L += norms_BL.double().sum(0)
        others_GLD = vectors_of_the_others(sums_GSLD)
        for places, means_BLD, _ in response_means(model, chat, rows, batch_tokens, advance):
            projected_RL[places] = (means_BLD.double() * others_GLD[group_R[places]]).sum(-1)
    mean_SLD = sums_GSLD.sum(0) / len(pairs)
    directions = Directions(
        (mean_SLD[0] - mean_SLD[1])[:, None], norms_L / len(rows), trait, model_name, len(pairs), len(pairs)
    )
    auc_L = held_out_auc(projected_RL.unflatten(0, (-1, 2)), [len(group) for group in groups])
    best = layer or int(np.argmax(auc_L)) + 1
    return _axis(directions, best, "as given" if layer else "the best", float(auc_L[best - 1]))


def vectors_of_the_others(sums_GSLD: Tensor) -> Tensor:
    """For each group the vector [L, D] that all other groups give, of no particular length, from the sums of the
    activations of each group's positive and negative answers."""
    # Positive and negative answers are equally many, so the difference of sums points where that of means does.
    others_GSLD = sums_GSLD.sum(0) - sums_GSLD
    return others_GSLD[:, 0] - others_GSLD[:, 1]


def held_out_auc(projected_PSL: Tensor, sizes: Sequence[int]) -> np.ndarray:
    """For each layer the AUC of a group's positive over its negative answers, mean over the groups.

    Args:
        projected_PSL: of both answers of every pair, group after group, on the vector that the other groups give.
        sizes: number of pairs of each group.
    """
    groups = [group_PSL.permute(1, 2, 0).numpy() for group_PSL in projected_PSL.split(list(sizes))]
    mean: np.ndarray = np.mean([[auc(*sides) for sides in zip(*group_SLP)] for group_SLP in groups], 0)
    return mean


def _axis(directions: Directions, layer: int, rule: str, auc: float | None = None) -> Axis:
    direction_D = directions.directions_LKD[layer - 1, 0].double()
    norm = float(directions.norms_L[layer - 1])
    unit_D = direction_D / direction_D.norm()
    return Axis(unit_D, norm, layer, directions.layers, directions.trait, directions.model, rule, auc)


def _checked(layer: int | None, layers: int) -> int | None:
    if layer is not None and not 1 <= layer <= layers:
        raise ModelError(f"layer {layer}: expected a layer from 1 to {layers}")
    return layer


# ------------------------------------------------------------------ scores


@dataclass(frozen=True)
class Scored:
    """Rows and their scores.

    Attributes:
        scores_R: projection on the trait vector, in shares of the mean activation length.
        random_RK: the same on random vectors.
    """

    rows: list[Row]
    scores_R: np.ndarray
    random_RK: np.ndarray

    def take(self, places: Sequence[int]) -> "Scored":
        """Some of the rows."""
        return Scored([self.rows[place] for place in places], self.scores_R[places], self.random_RK[places])

    @cached_property
    def order(self) -> np.ndarray:
        """Places of the rows, riskiest first; rows of like score as they stand in the file."""
        return np.argsort(-self.scores_R, kind="stable")

    def top(self, number: int) -> list[dict[str, Any]]:
        """The riskiest rows: rank, score, origin, and what the user and the model say first."""
        return [
            {
                "rank": rank,
                "score": float(self.scores_R[place]),
                "origin": self.rows[place].origin,
                "question": _first(self.rows[place], "user"),
                "answer": _first(self.rows[place], "assistant"),
            }
            for rank, place in enumerate(self.order[:number], 1)
        ]


def score(model: Any, chat: Chat, rows: Sequence[Row], axis: Axis, batch_tokens: int = 4096, seed: int = 0) -> Scored:
    """Projects the mean response activation of every row on the trait vector and on `RANDOM` random ones of the same
    length (the same for every model and all rows). Projections are kept, not activations.

    Raises:
        ModelError: the vector does not fit the model.
        DataError: a row cannot be rendered.
    """
    config = causal_lm(model).config.get_text_config()
    found, wanted = (axis.layers, len(axis.unit_D)), (config.num_hidden_layers, config.hidden_size)
    if found != wanted:
        raise ModelError(
            f"the vector for {axis.trait!r} was taken from {axis.model} with {found[0]} layers of size {found[1]}; "
            f"this model has {wanted[0]} layers of size {wanted[1]}"
        )
    units_KD = torch.cat([axis.unit_D[None], random_units(RANDOM, wanted[1], seed)])
    projected_RK = np.zeros((len(rows), len(units_KD)))
    with progress("rows", len(rows)) as advance:
        for places, means_BLD, _ in response_means(model, chat, rows, batch_tokens, advance):
            projected_RK[places] = (means_BLD[:, axis.layer - 1].double() @ units_KD.T / axis.norm).numpy()
    return Scored(list(rows), projected_RK[:, 0], projected_RK[:, 1:])


def random_units(number: int, size: int, seed: int) -> Tensor:
    """Vectors [K, D] of length 1 in directions drawn at random, float64."""
    drawn_KD = torch.randn(number, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn_KD / drawn_KD.norm(dim=-1, keepdim=True)


def question_of(row: Row) -> str:
    """What the user says in a row: rows in which it is the same are not independent."""
    return "\n".join(message["content"] for message in row.messages if message["role"] == "user")


def _first(row: Row, role: str) -> str:
    return next(message["content"] for message in row.messages if message["role"] == role)


# ------------------------------------------------------------------ two sets of rows


@dataclass(frozen=True)
class Contrast:
    """How well scores tell one set of rows from another, and what would do so without a trait vector.

    Attributes:
        auc: chance that a row of the first set scores higher than one of the second, ties half.
        same: share of the questions in both sets whose row in the first scores higher; None where there are none.
        length: the AUC of the number of response tokens. Below .5 the first set is shorter.
        random: 2.5 and 97.5 % of the AUCs of random vectors.
    """

    auc: Interval
    same: Interval | None
    length: Interval
    random: tuple[float, float]

    @property
    def rival(self) -> str | None:
        """What tells the two sets apart as well as the scores do: chance, length or random vectors; None if nothing."""
        length, random = self.length.mean, self.random
        rivals = {"chance": 0.5, "length": max(length, 1 - length), "random vectors": max(random[1], 1 - random[0])}
        return next((name for name, reached in rivals.items() if self.auc.low <= reached), None)

    @property
    def verdict(self) -> str:
        """What follows, in words."""
        if self.rival:
            return f"the scores tell the two apart no better than {self.rival}"
        return "the scores tell the two apart, better than length and random vectors do"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "random": list(self.random), "rival": self.rival, "verdict": self.verdict}


def compare(chat: Chat, first: Scored, second: Scored, seed: int = 0) -> Contrast:
    """Contrast of two sets of rows that were scored alike. Intervals by bootstrap over questions: rows with the same
    question, in either set, are drawn together."""
    rows = [*first.rows, *second.rows]
    questions = [question_of(row) for row in rows]
    is_first_R = np.arange(len(questions)) < len(first.rows)
    scores_R = np.concatenate([first.scores_R, second.scores_R])
    tokens_R = np.array([example.response_tokens for example in encode_rows(rows, chat, sys.maxsize)])
    random = [auc(a_R, b_R) for a_R, b_R in zip(first.random_RK.T, second.random_RK.T)]
    low, high = np.percentile(random, [2.5, 97.5])
    return Contrast(
        auc_interval(scores_R, is_first_R, questions, seed),
        _same_question(first, second, seed),
        auc_interval(tokens_R, is_first_R, questions, seed),
        (float(low), float(high)),
    )


def _same_question(first: Scored, second: Scored, seed: int) -> Interval | None:
    one, other = ({question_of(row): at for at, row in enumerate(scored.rows)} for scored in (first, second))
    ahead = [first.scores_R[one[q]] - second.scores_R[other[q]] for q in one if q in other]
    return rate_interval([0.5 * (np.sign(by) + 1) for by in ahead], seed=seed) if ahead else None


# ------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Screening:
    """What `screen_file` found; the last three are None without a known-good source."""

    source: str
    axis: Axis
    scored: Scored
    against: str | None = None
    known: Scored | None = None
    contrast: Contrast | None = None


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
    batch_tokens: int = 4096,
) -> Screening:
    """Scores every row of a source, writes the scores (a line of JSON for each row, in order: origin, rank, score) and
    a figure of them.

    Args:
        source: as in `load_rows`.
        vectors: a file of directions; else the vector comes from paired questions.
        pairs: sources of paired questions; default: `default_pairs`. Those whose question is in a screened row are left
            out.
        against: rows known to be good, to compare with.
        top: how many rows the figure marks.

    Raises:
        DataError: a source or file that does not fit, or fewer than two pairs are left.
        ModelError: the model cannot be loaded, the vectors do not fit it, or it has no such layer.
    """
    if vectors and pairs:
        raise DataError(f"--vectors ({vectors}) or --pairs ({', '.join(pairs)}), not both")
    if figure.suffix != ".svg":
        raise RingfenceError(f"{figure}: expected a file .svg, found {figure.suffix or 'no suffix'!r}")
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
        trait = f"misaligned minus aligned answers, {number} pairs of {', '.join(pairs) or 'shipped domains'}"
        axis = learn_axis(loaded, chat, groups, trait, model, layer, batch_tokens)
    scored = score(loaded, chat, rows, axis, batch_tokens)
    screening = Screening(source, axis, scored)
    if against:
        known = score(loaded, chat, good, axis, batch_tokens)
        screening = Screening(source, axis, scored, against, known, compare(chat, scored, known))
    _write_scores(scored, output)
    with style():
        write_whole(figure, svg(draw(screening, top)))
    return screening


def other_pairs(sources: Sequence[str], questions: Sequence[str]) -> list[list[Pair]]:
    """Pairs of each source, without those that ask one of `questions`."""
    asked = set(questions)
    return [
        [pair for pair in given_pairs(source) if pair.positive_prompt[-1]["content"] not in asked] for source in sources
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

    say(f"{screening.source}: {counted(len(screening.scored.rows), 'row')}, projected on {screening.axis}")
    table = Table(box=None, padding=(0, 1, 0, 0), expand=True)  # so that only the texts are cut
    for name, justify in (("rank", "right"), ("score", "right"), ("row", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("question", "answer"):
        table.add_column(name, ratio=1, no_wrap=True, overflow="ellipsis")
    for row in screening.scored.top(top):
        cells = str(row["rank"]), f"{row['score']:+.4f}", *(_line(row[key]) for key in ("origin", "question", "answer"))
        table.add_row(*map(Text, cells))
    console.print(table)
    if contrast := screening.contrast:
        say(f"against {screening.against}: {contrast.verdict}")
        for name, value in contrast_lines(contrast):
            say(f"  {name:<42} {value}")


def contrast_lines(contrast: Contrast) -> list[tuple[str, str]]:
    """Names and values, as they are shown."""

    def shown(interval: Interval) -> str:
        return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"

    same = contrast.same
    return [
        ("AUC of the score", f"{shown(contrast.auc)}, {counted(contrast.auc.n, 'question')}"),
        *([("same question: scores higher", f"{shown(same)}, {counted(same.n, 'question')}")] if same else []),
        ("AUC of length (of minus length)", f"{contrast.length.mean:.2f} ({1 - contrast.length.mean:.2f})"),
        (f"AUC of {RANDOM} random vectors, 95 % of them", "{:.2f} to {:.2f}".format(*contrast.random)),
    ]


def _line(text: str) -> str:
    """The start of a text on one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text[:200])


def draw(screening: Screening, top: int) -> Figure:
    """How the scores spread, the riskiest rows marked."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    sets = {screening.source: (screening.scored.scores_R, colour(0))}
    if screening.known:
        sets[f"{screening.against} (known good)"] = (screening.known.scores_R, GOOD)
    spread(axes, sets)
    marked = screening.scored.scores_R[screening.scored.order[:top]]
    axes.plot(
        marked, np.zeros(len(marked)), "|", color=colour(0), markersize=14, markeredgewidth=1.2, clip_on=False,
        label=f"the {len(marked)} riskiest rows",
    )  # fmt: skip
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.3, handlelength=1.4)
    axes.set_xlabel(score_label(screening.axis.layer))
    axes.set_ylabel("rows, %")
    return figure


def spread(axes: Axes, sets: dict[str, tuple[np.ndarray, str]]) -> None:
    """Histograms of scores, by name, in shares of the rows; one common set of bins."""
    edges = np.histogram_bin_edges(np.concatenate([scores for scores, _ in sets.values()]), 40).tolist()
    for name, (scores, shade) in sets.items():
        weights = np.full(len(scores), 100 / len(scores))
        label = f"{name}, {counted(len(scores), 'row')}"
        axes.hist(scores, edges, weights=weights, histtype="stepfilled", color=shade, alpha=0.25)
        axes.hist(scores, edges, weights=weights, histtype="step", color=shade, linewidth=1.4, label=label)


def score_label(layer: int) -> str:
    return f"projection after layer {layer}, shares of the mean activation length (right = misaligned)"
