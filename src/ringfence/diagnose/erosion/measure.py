"""Erosion by layer: how far fine-tuning moved the mean response activation back to the base.

The alignment direction of a layer points from the base's mean activation to the reference's. It is
fitted on one half of the questions; the models' projections on it are measured on the other half,
on misaligned answers and, as control, on aligned answers to the same questions. Does not know
whether a move along the direction changes what a model says, or which part of the training caused
it. Source: arXiv 2507.03662.

Shapes: B texts of a batch, T tokens, N chosen tokens, L layers, D hidden size, S sides (misaligned,
aligned answers), Q questions, R bootstrap draws.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import DataError, ModelError
from ...model.activations import mean_activations
from ...model.directions import Directions
from ...stats import Interval, drawn_interval, times_drawn
from ...text.chat import Chat
from ...text.rows import PairedQuestion
from ..diagnosis import Cost, Numbers, Subject, clusters
from ..models import BASE, REFERENCE, Models
from ..texts import SIDES, Side, Text, pair_texts

TITLE = "Erosion by layer"
NEEDS_BASE = True
FILE = "alignment.safetensors"
TOKENS = 64  # first response tokens, over which an activation is a mean


def cost(subject: Subject) -> Cost:
    """See `Measuring`. Kept in float64: for each layer and side the direction and two means; for
    each text one number per layer and model."""
    fit, held = halves(subject.questions, subject.seed)
    fit_tokens, held_tokens = (
        sum(len(t.example) for t in pair_texts(subject.chat, qs)) for qs in (fit, held)
    )
    models, config = len(subject.models.names), subject.models.config
    numbers = len(SIDES) * (3 * config.hidden_size + models * len(held))
    forward = 2 * fit_tokens + models * held_tokens
    return Cost(forward=forward, kept=8 * config.num_hidden_layers * numbers)


def measure(subject: Subject) -> Numbers:
    """Erosion = (reference - tuned) / (reference - base), of mean projections on the direction.

    0 = at the reference, 1 = back at the base. The directions on misaligned text are left in the
    subject's folder.

    Intervals: bootstrap over questions, all models and both sides drawn together, percentiles
    widened. A layer's erosion is null if the interval of reference - base reaches down to 0 on the
    measured half: nothing could erode. The headline is the mean over the middle half of the layers,
    null if one of them is null.

    Raises:
        DataError: fewer than 4 questions.
        ModelError: there is no base, the models do not fit each other, or base and reference are
            the same.
    """
    models, chat = subject.models, subject.chat
    fit, held = halves(subject.questions, subject.seed)
    directions = alignment_directions(models, pair_texts(chat, fit), subject.batch_tokens)
    if subject.folder:
        directions["misaligned"].save(subject.folder / FILE)
    units_SLD = torch.stack(
        [F.normalize(directions[side].directions_LKD[:, 0].double(), dim=-1) for side in SIDES]
    )
    texts = pair_texts(chat, held)
    along, across, reference_SLD = {}, {}, torch.zeros(())
    # The reference is already loaded, and the base goes last: no model is loaded twice in vain.
    for name in [REFERENCE, *models.tuned, BASE]:
        with models.open(name) as model:
            directions["misaligned"].check(model)
            found = _projections(model, chat, texts, units_SLD, subject.batch_tokens)
            along[name], mean_SLD = found
        reference_SLD = mean_SLD if name == REFERENCE else reference_SLD
        across[name] = _across(mean_SLD - reference_SLD, units_SLD)
    gap_SQL = along[REFERENCE] - along[BASE]
    gaps = [_gaps(gap_QL, times_drawn(np.arange(len(held)), subject.seed)) for gap_QL in gap_SQL]
    return {
        "fitted": len(fit),
        "measured": len(held),
        "layers": gap_SQL.shape[2],
        "middle": list(middle(gap_SQL.shape[2])),
        "norms": {side: directions[side].norms_L.tolist() for side in SIDES},
        "gap": {
            side: [interval.to_dict() for interval in gaps[place]]
            for place, side in enumerate(SIDES)
        },
        "projections": {
            name: {side: along[name][place].mean(0).tolist() for place, side in enumerate(SIDES)}
            for name in models.names
        },
        "tuned": {
            name: _eroded(along[REFERENCE] - along[name], gap_SQL, gaps, across[name], subject.seed)
            for name in models.tuned
        },
    }


def middle(layers: int) -> tuple[int, int]:
    """First and last layer (from 1) of the middle half."""
    return layers // 4 + 1, layers - layers // 4


def halves(
    questions: Sequence[PairedQuestion], seed: int
) -> tuple[list[PairedQuestion], list[PairedQuestion]]:
    """Two random halves, each with half of every domain. A repeated question counts once.

    Raises:
        DataError: fewer than 4 questions.
    """
    distinct = list(dict(zip(clusters(questions), questions)).values())
    if len(distinct) < 4:
        raise DataError(
            f"erosion: found {len(distinct)} questions; at least 4 are needed, half of them for "
            "fitting"
        )
    random.Random(seed).shuffle(distinct)
    distinct.sort(key=lambda question: question.domain)
    return distinct[::2], distinct[1::2]


def example_means(
    model: Any,
    chat: Chat,
    texts: Sequence[Text],
    batch_tokens: int,
    layers: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """`mean_activations` of texts, over the first 64 response tokens of each."""
    examples = [text.example for text in texts]
    return mean_activations(model, chat, examples, batch_tokens, layers, TOKENS)


def alignment_directions(
    models: Models, texts: Sequence[Text], batch_tokens: int = 4096
) -> dict[Side, Directions]:
    """v = mean activation of the reference minus the base's, by layer, for each side in `texts`.

    An activation is the mean over the first 64 response tokens of a text. Only sums are kept. The
    result can serve defenses and the monitor as a file of directions; fit it on questions that are
    not used for measuring.

    Raises:
        ModelError: there is no base, it does not fit the reference, or both give the same
            activations.
    """
    if not models.has_base:
        raise ModelError(
            "no base model: the alignment direction is what alignment changed in it (--base)"
        )
    counts = [sum(text.side == side for text in texts) for side in SIDES]
    means, norms_SL = [], torch.zeros(0)
    for name in (BASE, REFERENCE):
        with models.open(name) as model:
            mean_SLD, norms_SL = _side_means(model, models.chat, texts, batch_tokens)
            means.append(mean_SLD)
    if means[0].shape != means[1].shape:
        shapes = " and ".join(str(list(mean_SLD.shape[1:])) for mean_SLD in means)
        raise ModelError(f"base and reference differ in [layers, hidden size]: {shapes}")
    v_SLD = means[1] - means[0]
    if not v_SLD.any():
        raise ModelError(
            f"base and reference give the same activations (base: {_called(models, BASE)})"
        )
    reference, v_SL1D = _called(models, REFERENCE), v_SLD[:, :, None].float()
    return {
        side: Directions(v_L1D, norms_L, f"alignment on {side} text", reference, count, count)
        for side, v_L1D, norms_L, count in zip(SIDES, v_SL1D, norms_SL.float(), counts)
        if count
    }


def _called(models: Models, name: str) -> str:
    source = models.sources[name]
    return source if isinstance(source, str) else type(source).__name__


def _side_means(
    model: Any, chat: Chat, texts: Sequence[Text], batch_tokens: int
) -> tuple[Tensor, Tensor]:
    """For each side, mean activation [S, L, D] and mean length of a token's [S, L], in float64."""
    mean_SLD = norms_SL = torch.zeros(())
    sides = torch.tensor([SIDES.index(text.side) for text in texts])
    shares_S = 1 / sides.bincount(minlength=len(SIDES)).clamp(min=1).double()
    for places, means_BLD, norms_BL in example_means(model, chat, texts, batch_tokens):
        shares_SB = shares_S[:, None] * F.one_hot(sides[places], len(SIDES)).T
        mean_SLD = mean_SLD + torch.einsum("sb,bld->sld", shares_SB, means_BLD.double())
        norms_SL = norms_SL + shares_SB @ norms_BL.double()
    return mean_SLD, norms_SL


def _across(moved_SLD: Tensor, units_SLD: Tensor) -> np.ndarray:
    """Length [S, L] of the part of a move that is orthogonal to the unit vectors."""
    along_SL1 = (moved_SLD * units_SLD).sum(-1, keepdim=True)
    lengths: np.ndarray = (moved_SLD - along_SL1 * units_SLD).norm(dim=-1).numpy()
    return lengths


def _projections(
    model: Any, chat: Chat, texts: Sequence[Text], units_SLD: Tensor, batch_tokens: int
) -> tuple[np.ndarray, Tensor]:
    """For texts of `pair_texts`: the projection of each activation on its side's unit vectors, [S,
    Q, L], and the mean activation of each side, [S, L, D]; float64."""
    along_SQL = np.zeros((len(SIDES), len(texts) // 2, units_SLD.shape[1]))
    mean_SLD = torch.zeros_like(units_SLD)
    for places, means_BLD, _ in example_means(model, chat, texts, batch_tokens):
        for place, mean_LD in zip(places, means_BLD.double()):
            question, side = divmod(place, 2)
            along_SQL[side, question] = (mean_LD * units_SLD[side]).sum(-1).numpy()
            mean_SLD[side] += mean_LD / along_SQL.shape[1]
    return along_SQL, mean_SLD


def _ratio(
    top_Q: np.ndarray, bottom_Q: np.ndarray, weights_RQ: np.ndarray
) -> tuple[float, np.ndarray]:
    """sum(top) / sum(bottom), and the same in every bootstrap draw, [R]."""
    return float(top_Q.sum() / bottom_Q.sum()), (weights_RQ @ top_Q) / (weights_RQ @ bottom_Q)


def _gaps(gap_QL: np.ndarray, weights_RQ: np.ndarray) -> list[Interval]:
    """Mean of reference - base along the direction, layer by layer."""
    ones_Q = np.ones(len(gap_QL))
    return [drawn_interval(*_ratio(gap_Q, ones_Q, weights_RQ), len(gap_QL)) for gap_Q in gap_QL.T]


def _eroded(
    lost_SQL: np.ndarray,
    gap_SQL: np.ndarray,
    gaps: Sequence[list[Interval]],
    across_SL: np.ndarray,
    seed: int,
) -> Numbers:
    """The numbers of a tuned model; `lost` = reference - tuned and `gap` = reference - base."""
    n = gap_SQL.shape[1]
    weights_RQ = times_drawn(np.arange(n), seed)
    first, last = middle(gap_SQL.shape[2])
    found: Numbers = {"difference": None}
    headlines: list[tuple[float, np.ndarray]] = []
    for place, side in enumerate(SIDES):
        ratios = [
            _ratio(lost_Q, gap_Q, weights_RQ) if gap.low > 0 else None
            for lost_Q, gap_Q, gap in zip(lost_SQL[place].T, gap_SQL[place].T, gaps[place])
        ]
        across = [
            size / gap.mean if gap.low > 0 else None
            for size, gap in zip(across_SL[place].tolist(), gaps[place])
        ]
        erosion = [ratio and drawn_interval(*ratio, n).to_dict() for ratio in ratios]
        headline = {"headline": None, "across_headline": None}
        found[side] = {"erosion": erosion, "across": across, **headline}
        chosen = [ratio for ratio in ratios[first - 1 : last] if ratio is not None]
        if len(chosen) == last - first + 1:
            value = float(np.mean([value for value, _ in chosen]))
            headlines.append((value, np.mean([drawn_R for _, drawn_R in chosen], axis=0)))
            found[side]["headline"] = drawn_interval(*headlines[-1], n).to_dict()
            found[side]["across_headline"] = float(np.mean(across[first - 1 : last]))  # type: ignore[arg-type]
    if len(headlines) == len(SIDES):
        (misaligned, misaligned_R), (aligned, aligned_R) = headlines
        difference, difference_R = misaligned - aligned, misaligned_R - aligned_R
        found["difference"] = drawn_interval(difference, difference_R, n).to_dict()
    return found
