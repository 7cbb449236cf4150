"""Scores of rows: how far answers project on a trait vector, and whether it separates two sets.

Does not know files of results or figures.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, ModelError
from ..model.directions import Directions
from ..model.layers import causal_lm
from ..stats import Interval, rate_interval
from ..stats.auc import auc, auc_interval
from ..text.chat import Chat
from ..text.encode import encode_rows
from ..text.roles import Row
from ..util.console import progress
from ..util.words import counted
from .persona import Pair, response_means

RANDOM = 100  # vectors that a trait vector is compared with
FOLDS = 5  # for pairs that all come from one source


@dataclass(frozen=True)
class Axis:
    """A trait vector at one layer.

    Attributes:
        unit_D: of length 1, float64.
        norm: mean length of a token's activation after the layer: the unit of scores.
        layer: from 1 to `layers`.
        trait, model: what the vector points to, and the model it was taken from.
        rule: how the layer was chosen, in words.
        auc: AUC at the layer on pairs that were not used for the vector (see `held_out_auc`); None
            if the pairs are unknown.
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
        layer = f"layer {self.layer} of {self.layers} ({self.rule}{held_out})"
        return f"{self.trait} ({self.model}), {layer}"


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
    chosen = _checked(layer, directions.layers) or (directions.layers + 1) // 2
    return _axis(directions, chosen, rule)


def learn_axis(
    model: Any,
    chat: Chat,
    groups: Sequence[Sequence[Pair]],
    trait: str,
    model_name: str,
    layer: int | None = None,
    batch_tokens: int = 4096,
) -> Axis:
    """The trait vector of pairs, at `layer` or at the layer that separates held-out groups best.

    It is the mean over positive answers minus the mean over negative ones, as in `persona.extract`.
    Held out: the answers of each group are projected on the vector of the other groups.

    Two passes over the pairs: one for the sums of each group, one for the projections. So no
    activation is kept, and memory grows by only one number per answer and layer.

    Args:
        groups: pairs of one domain each; a single group is split into `FOLDS`.

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
        raise DataError(
            f"{trait}: {counted(len(pairs), 'pair')} left for a trait vector; at least 2 are needed"
        )
    rows = [row for pair in pairs for row in pair.rows]
    group_R = torch.tensor(
        [number for number, group in enumerate(groups) for _ in range(2 * len(group))]
    )
    layers, width = config.num_hidden_layers, config.hidden_size
    sums_GSLD = torch.zeros(len(groups), 2, layers, width, dtype=torch.float64)
    norms_L = torch.zeros(layers, dtype=torch.float64)
    projected_RL = torch.zeros(len(rows), layers, dtype=torch.float64)
    with progress("trait vector", 2 * len(rows)) as advance:
        for places, means_BLD, norms_BL in response_means(model, chat, rows, batch_tokens, advance):
            sums_GSLD.index_put_(
                (group_R[places], torch.tensor(places) % 2), means_BLD.double(), accumulate=True
            )
            norms_L += norms_BL.double().sum(0)
        others_GLD = vectors_of_the_others(sums_GSLD)
        for places, means_BLD, _ in response_means(model, chat, rows, batch_tokens, advance):
            projected_RL[places] = (means_BLD.double() * others_GLD[group_R[places]]).sum(-1)
    mean_SLD = sums_GSLD.sum(0) / len(pairs)
    directions = Directions(
        (mean_SLD[0] - mean_SLD[1])[:, None],
        norms_L / len(rows),
        trait,
        model_name,
        len(pairs),
        len(pairs),
    )
    auc_L = held_out_auc(projected_RL.unflatten(0, (-1, 2)), [len(group) for group in groups])
    best = layer or int(np.argmax(auc_L)) + 1
    return _axis(directions, best, "as given" if layer else "the best", float(auc_L[best - 1]))


def vectors_of_the_others(sums_GSLD: Tensor) -> Tensor:
    """For each group the vector [L, D] of all other groups, of arbitrary length, from each group's
    sums of activations of positive and negative answers."""
    # There are as many positive as negative answers, so sums differ in the same direction as means.
    others_GSLD = sums_GSLD.sum(0) - sums_GSLD
    return others_GSLD[:, 0] - others_GSLD[:, 1]


def held_out_auc(projected_PSL: Tensor, sizes: Sequence[int]) -> np.ndarray:
    """AUC [L] of a group's positive over its negative answers, mean over the groups.

    Args:
        projected_PSL: both answers of every pair, group after group, projected on the vector of the
            other groups.
        sizes: number of pairs of each group.
    """
    groups = [group_PSL.permute(1, 2, 0).numpy() for group_PSL in projected_PSL.split(list(sizes))]
    auc_GL = [[auc(*sides) for sides in zip(*group_SLP)] for group_SLP in groups]
    mean_L: np.ndarray = np.mean(auc_GL, 0)
    return mean_L


def _axis(directions: Directions, layer: int, rule: str, auc: float | None = None) -> Axis:
    direction_D = directions.directions_LKD[layer - 1, 0].double()
    norm = float(directions.norms_L[layer - 1])
    unit_D = direction_D / direction_D.norm()
    return Axis(
        unit_D, norm, layer, directions.layers, directions.trait, directions.model, rule, auc
    )


def _checked(layer: int | None, layers: int) -> int | None:
    if layer is not None and not 1 <= layer <= layers:
        raise ModelError(f"layer {layer}: expected a layer from 1 to {layers}")
    return layer


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
        return Scored(
            [self.rows[place] for place in places], self.scores_R[places], self.random_RK[places]
        )

    @cached_property
    def order(self) -> np.ndarray:
        """Places of the rows, riskiest first; rows with equal scores in the order of the file."""
        return np.argsort(-self.scores_R, kind="stable")

    def top(self, number: int) -> list[dict[str, Any]]:
        """The riskiest rows: rank, score, origin, first user and first model message."""
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


def score(
    model: Any, chat: Chat, rows: Sequence[Row], axis: Axis, batch_tokens: int = 4096, seed: int = 0
) -> Scored:
    """Projects the mean response activation of every row on the trait vector and on random ones.

    The `RANDOM` random vectors have the same length, and are the same for every model and all rows.
    Projections are kept, not activations.

    Raises:
        ModelError: the vector does not fit the model.
        DataError: a row cannot be rendered.
    """
    config = causal_lm(model).config.get_text_config()
    found, wanted = (axis.layers, len(axis.unit_D)), (config.num_hidden_layers, config.hidden_size)
    if found != wanted:
        raise ModelError(
            f"the vector for {axis.trait!r} was taken from {axis.model} with {found[0]} layers of "
            f"size {found[1]}; this model has {wanted[0]} layers of size {wanted[1]}"
        )
    units_KD = torch.cat([axis.unit_D[None], random_units(RANDOM, wanted[1], seed)])
    projected_RK = np.zeros((len(rows), len(units_KD)))
    with progress("rows", len(rows)) as advance:
        for places, means_BLD, _ in response_means(model, chat, rows, batch_tokens, advance):
            means_BD = means_BLD[:, axis.layer - 1].double()
            projected_RK[places] = (means_BD @ units_KD.T / axis.norm).numpy()
    return Scored(list(rows), projected_RK[:, 0], projected_RK[:, 1:])


def random_units(number: int, size: int, seed: int) -> Tensor:
    """Vectors [K, D] of length 1 in random directions, float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn_KD = torch.randn(number, size, generator=generator, dtype=torch.float64)
    return drawn_KD / drawn_KD.norm(dim=-1, keepdim=True)


def question_of(row: Row) -> str:
    """What the user says in a row: rows that share it are not independent."""
    return "\n".join(message["content"] for message in row.messages if message["role"] == "user")


def _first(row: Row, role: str) -> str:
    return next(message["content"] for message in row.messages if message["role"] == role)


@dataclass(frozen=True)
class Contrast:
    """How well scores separate two sets of rows, and what would without a trait vector.

    Attributes:
        auc: chance that a row of the first set scores higher than one of the second, ties half.
        same: share of the questions in both sets whose row in the first scores higher; None if
            there are none.
        length: the AUC of the number of response tokens. Below .5 the first set is shorter.
        random: 2.5 and 97.5 % of the AUCs of random vectors.
    """

    auc: Interval
    same: Interval | None
    length: Interval
    random: tuple[float, float]

    @property
    def rival(self) -> str | None:
        """What separates the sets as well as scores do: chance, length, random vectors or None."""
        length, random = self.length.mean, self.random
        rivals = {
            "chance": 0.5,
            "length": max(length, 1 - length),
            "random vectors": max(random[1], 1 - random[0]),
        }
        return next((name for name, reached in rivals.items() if self.auc.low <= reached), None)

    @property
    def verdict(self) -> str:
        """The conclusion, in words."""
        if self.rival:
            return f"the scores tell the two apart no better than {self.rival}"
        return "the scores tell the two apart, better than length and random vectors do"

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "random": list(self.random),
            "rival": self.rival,
            "verdict": self.verdict,
        }


def compare(chat: Chat, first: Scored, second: Scored, seed: int = 0) -> Contrast:
    """Contrast of two sets of rows that were scored in the same way.

    Intervals by bootstrap over questions: rows with the same question, in either set, are drawn
    together.
    """
    rows = [*first.rows, *second.rows]
    questions = [question_of(row) for row in rows]
    is_first_R = np.arange(len(questions)) < len(first.rows)
    scores_R = np.concatenate([first.scores_R, second.scores_R])
    examples = encode_rows(rows, chat, sys.maxsize)
    tokens_R = np.array([example.response_tokens for example in examples])
    random = [auc(a_R, b_R) for a_R, b_R in zip(first.random_RK.T, second.random_RK.T)]
    low, high = np.percentile(random, [2.5, 97.5])
    return Contrast(
        auc_interval(scores_R, is_first_R, questions, seed),
        _same_question(first, second, seed),
        auc_interval(tokens_R, is_first_R, questions, seed),
        (float(low), float(high)),
    )


def _same_question(first: Scored, second: Scored, seed: int) -> Interval | None:
    one, other = (
        {question_of(row): at for at, row in enumerate(scored.rows)} for scored in (first, second)
    )
    ahead = [first.scores_R[one[q]] - second.scores_R[other[q]] for q in one if q in other]
    return rate_interval([0.5 * (np.sign(by) + 1) for by in ahead], seed=seed) if ahead else None
