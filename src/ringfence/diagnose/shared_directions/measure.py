"""Shared directions: does a change of activations vary along the same directions in both sets?

A change is that of the response activation at one layer, from the base to the reference or from the
reference to a tuned model. Its top directions are compared between questions inside and outside the
domain, on misaligned answers and, as control, on aligned answers to the same questions, and with
three exchanges that each show the level of chance. Then the direction is taken out of, and added
to, the tuned model. Does not know why a direction is shared. Source: arXiv 2507.03662.

Shapes: N examples, D hidden size, K directions, S sides (misaligned, aligned answers), Q questions
(inside, then outside).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t
from torch import Tensor

from ...errors import DataError, ModelError
from ...model.interventions import edited_states
from ...model.layers import causal_lm
from ...model.scoring import score_answers
from ...stats import mean_interval
from ...text.rows import PairedQuestion
from ..diagnosis import Cost, Numbers, Subject, clusters
from ..erosion.measure import example_means
from ..models import BASE, REFERENCE
from ..texts import SIDES, Text, pair_texts

TITLE = "Shared directions"
NEEDS_BASE = True
K = 4  # directions of a subspace
MOST = 128  # questions of a set, because activations at one layer are kept
EXCHANGES = 499
RANDOM = 8  # random directions in the causal check
SCORES = ("cosine", "subspace")


def cost(subject: Subject) -> Cost:
    """See `Measuring`. Kept in float64: activations of three models at one layer, and their
    differences, for at most 128 questions per set."""
    inside, outside = _chosen(subject)
    lengths = [len(text.example) for text in pair_texts(subject.chat, [*inside, *outside])]
    scorings = 1 + len(subject.models.tuned) * (1 + len(EDITS) * (1 + RANDOM))
    states = len(subject.models.names) * sum(lengths)
    scored = scorings * sum(lengths[2 * len(inside) :])
    kept = 4 * 8 * len(lengths) * subject.models.config.hidden_size
    return Cost(forward=states + scored, kept=kept)


def measure(subject: Subject) -> Numbers:
    """Shared directions of the changes from base to reference and from reference to tuned models.

    See `_shared`, and `_causal` for the causal check: of the top direction of the first change on
    misaligned inside answers, by margins of outside questions.

    Raises:
        DataError: fewer than 6 questions inside or outside.
        ModelError: there is no base, the models do not fit each other, or two of them give the same
            activations.
    """
    models, seed = subject.models, subject.seed
    if not models.has_base:
        raise ModelError(
            "no base model: the directions are those of what alignment changed in it (--base)"
        )
    inside, outside = _chosen(subject)
    texts = pair_texts(models.chat, [*inside, *outside])
    shape = models.config.num_hidden_layers, models.config.hidden_size
    layer = layer_of(shape[0])
    with models.open(BASE) as model:
        base_SQD = _states(model, subject, texts, layer, shape)
    with models.open(REFERENCE) as model:
        reference_SQD = _states(model, subject, texts, layer, shape)
        reference_Q = _margins(model, subject, outside)
    alignment = _shared("base and reference", reference_SQD, base_SQD, len(inside), seed)
    unit_D, step = oriented((reference_SQD - base_SQD)[0, : len(inside)])
    tuned = {}
    for name in models.tuned:
        with models.open(name) as model:
            tuned_SQD = _states(model, subject, texts, layer, shape)
            direction = torch.tensor(unit_D)
            causal = _causal(model, subject, outside, reference_Q, layer, direction, step)
        change = _shared(f"{name} and the reference", tuned_SQD, reference_SQD, len(inside), seed)
        tuned[name] = {"change": change, "causal": causal}
    return {
        "layer": layer,
        "layers": shape[0],
        "questions": {"inside": len(inside), "outside": len(outside)},
        "subspace": K,
        "step": step,
        "alignment": alignment,
        "tuned": tuned,
    }


def layer_of(layers: int) -> int:
    """The layer (from 1) that is examined: two thirds of the way up, fixed in advance."""
    return round(2 * layers / 3)


def _chosen(subject: Subject) -> tuple[list[PairedQuestion], list[PairedQuestion]]:
    """Inside and outside questions, up to 128 of each, drawn at random. Repeats count once."""
    chosen = []
    for place, questions in (("inside", subject.inside), ("outside", subject.outside)):
        distinct = list(dict(zip(clusters(questions), questions)).values())
        if len(distinct) < K + 2:
            raise DataError(
                f"shared_directions: found {len(distinct)} questions {place} the domain; at least "
                f"{K + 2} are needed"
            )
        kept = random.Random(subject.seed).sample(range(len(distinct)), min(MOST, len(distinct)))
        chosen.append([distinct[at] for at in sorted(kept)])
    return chosen[0], chosen[1]


def _states(
    model: Any, subject: Subject, texts: Sequence[Text], layer: int, shape: tuple[int, int]
) -> np.ndarray:
    """Activations [S, Q, D] of texts of `pair_texts` (means over 64 response tokens), float64."""
    config = causal_lm(model).config.get_text_config()
    found = (config.num_hidden_layers, config.hidden_size)
    if found != shape:
        raise ModelError(
            f"models differ in (layers, hidden size): {found}, and {shape} of the reference"
        )
    states_SQD = np.zeros((len(SIDES), len(texts) // 2, shape[1]))
    tokens = subject.batch_tokens
    for places, means_B1D, _ in example_means(model, subject.chat, texts, tokens, [layer]):
        for place, mean_1D in zip(places, means_B1D):
            states_SQD[place % 2, place // 2] = mean_1D[0].numpy()
    return states_SQD


def top_directions(rows_ND: np.ndarray, number: int = K) -> np.ndarray:
    """The first right singular vectors [K, D] of the centred rows, up to sign.

    From the Gram matrix [N, N] of the rows, because there are fewer rows than hidden dimensions.
    """
    centred_ND = rows_ND - rows_ND.mean(0)
    _, left_NN = np.linalg.eigh(centred_ND @ centred_ND.T)  # ascending
    right_DK, _ = np.linalg.qr(centred_ND.T @ left_NN[:, : -number - 1 : -1])
    right_KD: np.ndarray = right_DK.T  # arbitrary beyond the rank of the rows
    return right_KD


def principal_cosines(a_KD: np.ndarray, b_KD: np.ndarray) -> np.ndarray:
    """Cosines [K] of the principal angles of two subspaces (orthonormal bases), largest first."""
    cosines_K: np.ndarray = np.linalg.svd(a_KD @ b_KD.T, compute_uv=False).clip(0, 1)
    return cosines_K


def likeness(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    """For two sets of changes: |cosine| of their top directions, and mean cosine of the principal
    angles between their top subspaces, [2] as in `SCORES`."""
    a_KD, b_KD = top_directions(a_ND), top_directions(b_ND)
    return np.array([min(1.0, abs(a_KD[0] @ b_KD[0])), principal_cosines(a_KD, b_KD).mean()])


def oriented(rows_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """The top unit direction [D], signed like the rows' mean along it, and that mean."""
    unit_D = top_directions(rows_ND, 1)[0]
    step = float(rows_ND.mean(0) @ unit_D)
    return (unit_D, step) if step >= 0 else (-unit_D, -step)


def _shared(
    pair: str, later_SQD: np.ndarray, earlier_SQD: np.ndarray, inside: int, seed: int
) -> Numbers:
    """How alike the changes inside and outside are, on each side, and after three exchanges.

    `pairs`: the earlier activation is that of another text of the set, so a change is no longer
    that of one text; the likeness left is the shape of the stream. `sets`: inside and outside are
    mixed, which gives the likeness of two sets of one kind. `difference`: the misaligned and
    aligned answers to each question change places at random, which gives the difference if it did
    not matter which answer is misaligned. The mean change of each set and side is removed before
    the last two: otherwise different means would become a direction that both mixtures share.
    """
    change_SQD = later_SQD - earlier_SQD
    if not change_SQD.any():
        raise ModelError(f"{pair} give the same activations: there is no change to look at")
    rng = np.random.default_rng(seed)
    questions = change_SQD.shape[1]

    sets = change_SQD[:, :inside], change_SQD[:, inside:]
    centred = [set_SND - set_SND.mean(1, keepdims=True) for set_SND in sets]
    centred_SQD = np.concatenate(centred, axis=1)

    def alike(rows_QD: np.ndarray) -> np.ndarray:
        return likeness(rows_QD[:inside], rows_QD[inside:])

    def within_sets() -> np.ndarray:
        parts = rng.permutation(inside), inside + rng.permutation(questions - inside)
        return np.concatenate(parts)

    observed_SC = np.stack([alike(change_QD) for change_QD in change_SQD])
    found: Numbers = {}
    for place, side in enumerate(SIDES):
        later_QD, earlier_QD, change_QD = later_SQD[place], earlier_SQD[place], change_SQD[place]
        pairs_EC = np.stack([alike(later_QD - earlier_QD[within_sets()]) for _ in range(EXCHANGES)])
        mixed_QD = (centred_SQD[place, rng.permutation(questions)] for _ in range(EXCHANGES))
        sets_EC = np.stack([alike(rows_QD) for rows_QD in mixed_QD])
        halves = change_QD[:inside], change_QD[inside:]
        cosines_K = principal_cosines(*(top_directions(half_ND) for half_ND in halves))
        one_D, other_D = (half_ND.mean(0) for half_ND in halves)
        mean_cosine = one_D @ other_D / np.linalg.norm(one_D) / np.linalg.norm(other_D)
        found[side] = {
            **dict(zip(SCORES, observed_SC[place].tolist())),
            "angles": np.degrees(np.arccos(cosines_K)).tolist(),
            "mean_cosine": float(mean_cosine),
            "pairs": _exchanged(pairs_EC, pairs_EC >= observed_SC[place]),
            "sets": _exchanged(sets_EC, sets_EC <= observed_SC[place]),
        }
    swapped_EC = []
    for _ in range(EXCHANGES):
        is_swapped_Q1 = rng.random((questions, 1)) < 0.5
        swapped_SQD = np.where(is_swapped_Q1, centred_SQD[::-1], centred_SQD)
        swapped_EC.append(alike(swapped_SQD[0]) - alike(swapped_SQD[1]))
    difference_C = observed_SC[0] - observed_SC[1]
    as_far_EC = np.abs(swapped_EC) >= np.abs(difference_C)
    found["difference"] = {
        **dict(zip(SCORES, difference_C.tolist())),
        "sides": _exchanged(np.stack(swapped_EC), as_far_EC),
    }
    return found


def _exchanged(scores_EC: np.ndarray, counts_EC: np.ndarray) -> Numbers:
    """For both scores, the middle 95 % over exchanges, and the p-value: the share that counts."""
    p_C = (1 + counts_EC.sum(0)) / (1 + EXCHANGES)
    return {
        name: {"low": float(low), "high": float(high), "p": float(p)}
        for name, low, high, p in zip(SCORES, *np.percentile(scores_EC, [2.5, 97.5], axis=0), p_C)
    }


def _take_out(unit_D: Tensor, towards_D: Tensor, step: float, hidden_BTD: Tensor) -> Tensor:
    """Subtracts as much of `towards` as the stream has of `unit`: a projection if both agree."""
    return hidden_BTD - (hidden_BTD @ unit_D)[..., None] * towards_D


def _add(unit_D: Tensor, towards_D: Tensor, step: float, hidden_BTD: Tensor) -> Tensor:
    return hidden_BTD + step * towards_D


EDITS: dict[str, Callable[[Tensor, Tensor, float, Tensor], Tensor]] = {
    "taken_out": _take_out,
    "added": _add,
}


@contextmanager
def edited(model: Any, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`edit` changes the residual stream [B, T, D] after `layer` (from 1), in float32."""

    def in_float32(hidden_BTD: Tensor) -> Tensor:
        return edit(hidden_BTD.float()).to(hidden_BTD.dtype)

    with edited_states(model, layer, in_float32):
        yield


def random_units(unit_D: Tensor, number: int, seed: int) -> list[Tensor]:
    """Unit directions [D] orthogonal to `unit`, uniform over all of them."""
    generator = torch.Generator().manual_seed(seed)
    random_RD = torch.randn(number, len(unit_D), generator=generator, dtype=unit_D.dtype)
    return list(F.normalize(random_RD - (random_RD @ unit_D)[:, None] * unit_D, dim=-1))


def _margins(model: Any, subject: Subject, questions: Sequence[PairedQuestion]) -> np.ndarray:
    """Margins [Q]: mean token log p of the misaligned answer minus the aligned one's, in nats."""
    prompts = [[{"role": "user", "content": question.question}] for question in questions]
    answers = [[getattr(question, side) for side in SIDES] for question in questions]
    scores = score_answers(model, subject.chat, prompts, answers, subject.batch_tokens)
    return np.array([misaligned.mean - aligned.mean for misaligned, aligned in scores])


def _causal(
    model: Any,
    subject: Subject,
    questions: Sequence[PairedQuestion],
    reference_Q: np.ndarray,
    layer: int,
    unit_D: Tensor,
    step: float,
) -> Numbers:
    """Change of margins when a tuned model's stream is edited after the layer, at every token.

    The edits: the direction taken out, or a step along it added. The control: the same along random
    directions, which move every token as far. `chance` = the 95 % range of the mean change along
    one more random direction (Student's prediction interval); `beyond` = the change minus the mean
    change along random ones, paired by question.
    """
    names = clusters(questions)

    def interval(values_Q: np.ndarray) -> dict[str, float]:
        return mean_interval(values_Q.tolist(), names, subject.seed).to_dict()

    before_Q = _margins(model, subject, questions)
    found: Numbers = {"shift": interval(before_Q - reference_Q)}
    unit_D = unit_D.float().to(model.device)
    randoms = random_units(unit_D.cpu(), RANDOM, subject.seed)
    for name, edit in EDITS.items():
        changes = []
        for towards_D in (unit_D, *randoms):
            with edited(model, layer, partial(edit, unit_D, towards_D.to(unit_D), step)):
                changes.append(_margins(model, subject, questions) - before_Q)
        change_Q, random_RQ = changes[0], np.stack(changes[1:])
        found[name] = {
            "change": interval(change_Q),
            "random": random_RQ.mean(1).tolist(),
            "chance": _prediction(random_RQ.mean(1)),
            "beyond": interval(change_Q - random_RQ.mean(0)),
        }
    return found


def _prediction(values_R: np.ndarray) -> dict[str, float]:
    """The 95 % range of one more such value, if they are normal."""
    number = len(values_R)
    reach = float(t.ppf(0.975, number - 1) * values_R.std(ddof=1) * np.sqrt(1 + 1 / number))
    return {"low": float(values_R.mean()) - reach, "high": float(values_R.mean()) + reach}
