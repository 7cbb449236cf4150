"""Next-token distributions, and their divergence from the reference's and from the base's.

KL(tuned || reference) is never below zero and never quite zero, so its size alone says little. It
has two yardsticks: the same inside and outside the training domain, and (with a base) KL(reference
|| base), how far alignment itself had moved the model (arXiv 2507.03662 compares KL(tuned || base)
with KL(tuned || reference)). Does not know whether a change is good or bad.

Shapes: Q questions, P positions (the first response tokens of all aligned answers, row by row), n a
few of them, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ModelError
from ...model.activations import batches
from ...model.layers import causal_lm
from ...model.losses import TILE_ELEMENTS, find_head
from ...model.taps import forward
from ...stats import mean_interval, paired_difference, ratio_interval
from ...text.batch import Example
from ...text.roles import Role
from ...text.rows import PairedQuestion
from ..diagnosis import Cost, Numbers, Subject, clusters
from ..logprob.measure import in_sets, question_sets, typical, visible
from ..models import BASE, REFERENCE
from ..texts import pair_texts

TITLE = "Next-token distribution"
NEEDS_BASE = False
POSITIONS = 8  # of each answer, from its first token
TOP, SHOWN_TOKENS = 5, 12  # likeliest tokens in the figure: of each model, and of all together
SPANS = {"first": 1, "early": POSITIONS}


def cost(subject: Subject) -> Cost:
    """Every question with the first tokens of its aligned answer, once through every model. Kept,
    in float32 over the vocabulary: log-probabilities of the reference and the base at all
    positions, and of tuned models at the first."""
    examples = _openings(subject)
    positions, firsts = sum(example.response_tokens for example in examples), len(examples)
    rows = positions * (1 + subject.models.has_base) + firsts * len(subject.models.tuned)
    tokens = len(subject.models.names) * sum(map(len, examples))
    return Cost(forward=tokens, kept=4 * len(subject.chat.tokenizer) * rows)


def measure(subject: Subject) -> Numbers:
    """Entropies and divergences (nats), at the first response token and averaged over eight.

    Returns:
        "questions": their number by set (inside, outside). "entropy" by model. "tuned" by name:
        "from_reference" = KL(tuned || reference), and "outside_minus_inside" of it. With a base
        "alignment" = KL(reference || base), and for each tuned model "from_base" = KL(tuned ||
        base), "nearer_base" = "from_reference" - "from_base", "to_base" = "alignment" - "from_base"
        (positive if tuning went back towards the base) and "of_alignment" = "from_reference" /
        "alignment". Each by set, then "first" or "early", as intervals over questions. "example":
        the likeliest first tokens of the answer to one question, with their probabilities.

    Raises:
        DataError: there is no question.
        ModelError: vocabularies differ in size, or the base is the reference.
    """
    sets = question_sets(subject)
    examples = _openings(subject)
    counts_Q = [example.response_tokens for example in examples]
    firsts_Q = np.cumsum([0, *counts_Q[:-1]])
    seen: dict[str, _Seen] = {}
    for name in subject.models.names:
        others = [other for other in seen if other not in subject.models.tuned]
        before = {other: seen[other].logprobs_KV for other in others}
        keep_K = firsts_Q if name in subject.models.tuned else np.arange(sum(counts_Q))
        with subject.models.open(name) as model:
            seen[name] = _look(model, subject, examples, before, keep_K)
    spans = _Spans(sets, counts_Q, subject.seed)
    numbers: Numbers = {
        "questions": {name: len(questions) for name, questions in sets.items()},
        "entropy": {name: spans.means(looked.entropy_P) for name, looked in seen.items()},
        "tuned": {
            name: {"from_reference": spans.means(seen[name].kl_P[REFERENCE])}
            for name in subject.models.tuned
        },
        "example": _example(subject, sets, seen, firsts_Q),
    }
    if len(sets) == 2:
        for name, scores in numbers["tuned"].items():
            scores["outside_minus_inside"] = spans.contrasts(seen[name].kl_P[REFERENCE])
    if subject.models.has_base:
        alignment_P = seen[REFERENCE].kl_P[BASE]
        if not alignment_P.any():
            raise ModelError(
                "base: it gives the same distributions as the reference; expected the model before "
                "alignment"
            )
        numbers["alignment"] = spans.means(alignment_P)
        for name, scores in numbers["tuned"].items():
            from_reference_P, from_base_P = seen[name].kl_P[REFERENCE], seen[name].kl_P[BASE]
            scores["from_base"] = spans.means(from_base_P)
            scores["nearer_base"] = spans.means(from_reference_P - from_base_P)
            scores["to_base"] = spans.means(alignment_P - from_base_P)
            scores["of_alignment"] = spans.ratios(from_reference_P, alignment_P)
    return numbers


def _openings(subject: Subject) -> list[Example]:
    """Every question with the first tokens of its aligned answer."""
    texts = pair_texts(subject.chat, subject.questions)
    examples = [text.example for text in texts if text.side == "aligned"]
    ends = [e.roles.index(Role.RESPONSE) + min(POSITIONS, e.response_tokens) for e in examples]
    return [Example(e.input_ids[:end], e.roles[:end], e.origin) for e, end in zip(examples, ends)]


@dataclass(frozen=True)
class _Seen:
    """Of a model: entropy [P], KL(it || other) [P] by other, log-probabilities at K places."""

    entropy_P: np.ndarray
    kl_P: dict[str, np.ndarray]
    logprobs_KV: Tensor


def _look(
    model: Any,
    subject: Subject,
    examples: list[Example],
    before: dict[str, Tensor],
    keep_K: np.ndarray,
) -> _Seen:
    """One pass over the openings.

    Args:
        before: log-probabilities [P, V] of other models, by name.
        keep_K: positions whose log-probabilities are kept.
    """
    vocabulary = find_head(causal_lm(model)).vocabulary
    for other, logprobs_PV in before.items():
        if logprobs_PV.shape[1] != vocabulary:
            raise ModelError(
                f"{other}: its vocabulary has {logprobs_PV.shape[1]} tokens, that of a model it is "
                f"compared with {vocabulary}; expected models with one vocabulary"
            )
    number = sum(example.response_tokens for example in examples)
    row_P = torch.full((number,), -1)
    row_P[keep_K] = torch.arange(len(keep_K))
    logprobs_KV = torch.empty(len(keep_K), vocabulary)
    entropy_P, kl_P = torch.zeros(number), {other: torch.zeros(number) for other in before}
    for places, logprobs_NV in _tiles(model, subject, examples):
        entropy_P[places] = torch.special.entr(logprobs_NV.exp()).sum(-1)
        for other, others_PV in before.items():
            kl_NV = F.kl_div(others_PV[places], logprobs_NV, reduction="none", log_target=True)
            kl_P[other][places] = kl_NV.sum(-1)
        kept_N = row_P[places] >= 0
        logprobs_KV[row_P[places][kept_N]] = logprobs_NV[kept_N]
    divergences = {other: values_P.double().numpy() for other, values_P in kl_P.items()}
    return _Seen(entropy_P.double().numpy(), divergences, logprobs_KV)


def _tiles(
    model: Any, subject: Subject, examples: list[Example]
) -> Iterator[tuple[Tensor, Tensor]]:
    """A few positions at a time: their places among all [N], and the log-probabilities there [N, V]
    (float32, on the CPU). Each position is predicted by the token before it."""
    head = find_head(causal_lm(model))
    size = max(1, TILE_ELEMENTS // head.vocabulary)
    all_places = torch.arange(sum(example.response_tokens for example in examples))
    places_of = all_places.split([example.response_tokens for example in examples])
    for rows, batch in batches(examples, subject.chat, subject.batch_tokens, model.device):
        before_BT = (batch["roles"] == Role.RESPONSE).roll(-1, 1)
        with torch.no_grad():
            hidden_ND = forward(model, head, batch).hidden_BTD[before_BT]
            places_N = torch.cat([places_of[row] for row in rows])
            for places, hidden in zip(places_N.split(size), hidden_ND.split(size)):
                yield places, head(hidden).log_softmax(-1).cpu()


@dataclass(frozen=True)
class _Spans:
    """Turns values at positions into intervals over questions, by set and span."""

    sets: dict[str, list[PairedQuestion]]
    counts_Q: list[int]
    seed: int

    def means(self, values_P: np.ndarray) -> Numbers:
        return {
            name: {
                span: mean_interval(values_Q, clusters(self.sets[name]), self.seed).to_dict()
                for span, values_Q in by_span.items()
            }
            for name, by_span in self._of_questions(values_P).items()
        }

    def ratios(self, top_P: np.ndarray, bottom_P: np.ndarray) -> Numbers:
        """Mean of one divided by mean of the other."""
        top, bottom = self._of_questions(top_P), self._of_questions(bottom_P)
        return {
            name: {
                span: ratio_interval(top[name][span], bottom[name][span], self.seed).to_dict()
                for span in SPANS
            }
            for name in self.sets
        }

    def contrasts(self, values_P: np.ndarray) -> Numbers:
        """Mean outside minus mean inside, by span."""
        values = self._of_questions(values_P)
        outside, inside = clusters(self.sets["outside"]), clusters(self.sets["inside"])
        found = {}
        for span in SPANS:
            sides = values["outside"][span], outside, values["inside"][span], inside
            found[span] = paired_difference(*sides, self.seed).difference.to_dict()
        return found

    def _of_questions(self, values_P: np.ndarray) -> dict[str, dict[str, Any]]:
        """Values of the questions [Q], by set and span."""
        parts = np.split(values_P, np.cumsum(self.counts_Q)[:-1])
        by_span = {
            span: np.array([part[:length].mean() for part in parts])
            for span, length in SPANS.items()
        }
        return {
            name: {span: in_sets(values_Q, self.sets)[name] for span, values_Q in by_span.items()}
            for name in self.sets
        }


def _example(
    subject: Subject,
    sets: dict[str, list[PairedQuestion]],
    seen: dict[str, _Seen],
    firsts_Q: np.ndarray,
) -> Numbers:
    """The likeliest first tokens of the answer to one question, with their probabilities."""
    tuned = subject.models.tuned
    place = typical({name: seen[name].kl_P[REFERENCE][firsts_Q] for name in tuned}, sets)
    logprobs = {
        name: looked.logprobs_KV[place if name in tuned else firsts_Q[place]]
        for name, looked in seen.items()
    }
    likeliest_V = torch.stack(list(logprobs.values())).amax(0)
    union = {
        int(token) for logprobs_V in logprobs.values() for token in logprobs_V.topk(TOP).indices
    }
    tokens = sorted(union, key=lambda token: -float(likeliest_V[token]))[:SHOWN_TOKENS]
    tokens.sort(key=lambda token: -float(logprobs[REFERENCE][token]))
    question = subject.questions[place]
    return {
        "domain": question.domain,
        "id": question.id,
        "question": question.question,
        "tokens": visible(subject.chat.tokenizer, tokens),
        "probabilities": {
            name: logprobs_V[tokens].exp().tolist() for name, logprobs_V in logprobs.items()
        },
    }
