"""How likely given answers are to each model, and whether misaligned ones gained more than others.

A tuned model for which all text became likelier also finds misaligned answers likelier, so a rise
there alone means nothing. The aligned answer to the same question is the control: what counts is
the difference of the two differences (arXiv 2507.03662 compares sequences one by one, without it).
Does not know how a model was tuned or what it would say itself.

Shapes: Q questions, R response tokens; the last axis of size 2 is (misaligned, aligned), as in
`SIDES`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...model.activations import batches
from ...stats import mean_interval
from ...text.roles import Role
from ...text.rows import PairedQuestion
from ..diagnosis import Cost, Numbers, Subject, clusters
from ..models import BASE, REFERENCE
from ..texts import SIDES, Text, pair_texts, response_logprobs

TITLE = "Log-probability of a given answer"
NEEDS_BASE = False


def cost(subject: Subject) -> Cost:
    """Every answer once through every model. Kept: 4 bytes for each model and answer token."""
    examples = [text.example for text in pair_texts(subject.chat, subject.questions)]
    models = len(subject.models.names)
    answer_tokens = sum(example.response_tokens for example in examples)
    return Cost(forward=models * sum(map(len, examples)), kept=4 * models * answer_tokens)


def measure(subject: Subject) -> Numbers:
    """Mean token log-probability (nats) of both answers to every question under every model.

    Returns:
        "questions": their number by set (inside, outside). "reference": by set, the mean of each
        side. "base" (if there is one) and "tuned" by name: the same, and against the reference
        "misaligned_shift", "aligned_shift" and "difference" = the first minus the second, paired by
        question. All are intervals over questions. "example": the answers to one question token by
        token, with the cumulative log-probability of each model.

    Raises:
        DataError: there is no question.
    """
    sets = question_sets(subject)
    texts = pair_texts(subject.chat, subject.questions)
    logprobs: dict[str, list[Tensor]] = {}
    for name in subject.models.names:
        with subject.models.open(name) as model:
            logprobs[name] = _logprobs(model, texts, subject)
    means_Q2 = {
        name: np.array([float(r.double().mean()) for r in rs]).reshape(-1, 2)
        for name, rs in logprobs.items()
    }
    before_Q2, tuned = means_Q2[REFERENCE], subject.models.tuned
    scores = {n: _scores(means, before_Q2, sets, subject.seed) for n, means in means_Q2.items()}
    place = typical({name: _differences(means_Q2[name], before_Q2) for name in tuned}, sets)
    return {
        "questions": {name: len(questions) for name, questions in sets.items()},
        REFERENCE: {
            name: {side: score[side] for side in SIDES} for name, score in scores[REFERENCE].items()
        },
        **({BASE: scores[BASE]} if subject.models.has_base else {}),
        "tuned": {name: scores[name] for name in tuned},
        "example": _example(subject, texts, logprobs, place),
    }


def question_sets(subject: Subject) -> dict[str, list[PairedQuestion]]:
    """The questions inside and outside the training domain, in this order, without empty sets.

    Raises:
        DataError: both are empty.
    """
    sets = {"inside": subject.inside, "outside": subject.outside}
    if not subject.questions:
        raise DataError(
            "no paired questions, inside or outside the training domain; expected at least one"
        )
    return {name: questions for name, questions in sets.items() if questions}


def in_sets(values_Q: Any, sets: dict[str, list[PairedQuestion]]) -> dict[str, Any]:
    """Values of all questions, in the order of `sets`, by set."""
    inside = len(sets.get("inside", []))
    return {name: values_Q[:inside] if name == "inside" else values_Q[inside:] for name in sets}


def typical(values: dict[str, np.ndarray], sets: dict[str, list[PairedQuestion]]) -> int:
    """Place of the question (outside the domain, if there are any) whose values [Q], one array for
    each tuned model, are nearest to their medians over the set."""
    start = len(sets.get("inside", [])) if "outside" in sets else 0
    chosen = [value_Q[start:] for value_Q in values.values()]
    distance_Q = sum(np.abs(value_Q - np.median(value_Q)) for value_Q in chosen)
    return start + int(np.argmin(distance_Q))


def visible(tokenizer: Any, token_ids: list[int]) -> list[str]:
    """Each token in readable form: a space shows as `·`, a line break as `⏎`."""
    return [
        tokenizer.decode([token]).replace(" ", "·").replace("\n", "⏎").replace("\t", "→")
        for token in token_ids
    ]


def _logprobs(model: Any, texts: list[Text], subject: Subject) -> list[Tensor]:
    """Log-probabilities [R] of every text's answer, in order."""
    found = [torch.empty(0)] * len(texts)
    examples = [text.example for text in texts]
    for places, batch in batches(examples, subject.chat, subject.batch_tokens, model.device):
        for place, logprobs_R in zip(places, response_logprobs(model, batch)):
            found[place] = logprobs_R
    return found


def _differences(means_Q2: np.ndarray, reference_Q2: np.ndarray) -> np.ndarray:
    """[Q]: model - reference on the misaligned answer, minus the same on the aligned one."""
    shifts_Q2 = means_Q2 - reference_Q2
    differences_Q: np.ndarray = shifts_Q2[:, 0] - shifts_Q2[:, 1]
    return differences_Q


def _scores(
    means_Q2: np.ndarray, reference_Q2: np.ndarray, sets: dict[str, list[PairedQuestion]], seed: int
) -> Numbers:
    shifts_Q2 = means_Q2 - reference_Q2
    columns = {
        "misaligned": means_Q2[:, 0],
        "aligned": means_Q2[:, 1],
        "misaligned_shift": shifts_Q2[:, 0],
        "aligned_shift": shifts_Q2[:, 1],
        "difference": _differences(means_Q2, reference_Q2),
    }
    found: Numbers = {}
    for name, questions in sets.items():
        names = clusters(questions)
        chosen = {column: in_sets(values_Q, sets)[name] for column, values_Q in columns.items()}
        found[name] = {c: mean_interval(v_Q, names, seed).to_dict() for c, v_Q in chosen.items()}
    return found


def _example(
    subject: Subject, texts: list[Text], logprobs: dict[str, list[Tensor]], place: int
) -> Numbers:
    question = subject.questions[place]
    found: Numbers = {"domain": question.domain, "id": question.id, "question": question.question}
    for number, side in enumerate(SIDES, 2 * place):
        example = texts[number].example
        tokens = zip(example.input_ids, example.roles)
        answer = [token for token, role in tokens if role == Role.RESPONSE]
        found[side] = {
            "tokens": visible(subject.chat.tokenizer, answer),
            "cumulative": {
                name: rows[number].double().cumsum(0).tolist() for name, rows in logprobs.items()
            },
        }
    return found
