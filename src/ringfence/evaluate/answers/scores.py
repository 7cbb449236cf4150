"""Scores: what a judge made of one prompt, from probabilities or from the words of a reply.

Does not know judges, questions or rates.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .replies import Reply

LEAST_MASS = 0.25  # probability of all numbers together, below which there is no score

_LABEL: dict[str, Literal["refusal", "code"]] = {"REFUSAL": "refusal", "CODE": "code"}


@dataclass(frozen=True)
class Score:
    """What a judge made of one prompt.

    Attributes:
        value: 0 to 100, or None.
        label: `refusal` or `code`, given instead of a number.
        method: `expected` = weighted by probability; `sampled` = the number in the reply.
        mass: probability of all numbers together; None if sampled.
        unscored: why there is neither value nor label.
        failed: no reply came; it may be asked again.
        adapted: how the request to a server differed from the settings (`without temperature`).
    """

    value: float | None = None
    label: Literal["refusal", "code"] | None = None
    method: Literal["expected", "sampled"] = "expected"
    mass: float | None = None
    unscored: str | None = None
    failed: bool = False
    adapted: tuple[str, ...] = ()


def expected_score(numbers: Mapping[int, float], labels: Mapping[str, float]) -> Score:
    """The mean of the numbers, weighted by probability; a label if it is likelier than all of them.

    Neither if the numbers together (or the label) have a probability below 0.25.
    """
    mass = sum(numbers.values())
    label = max(labels, key=lambda name: labels[name], default="")
    if label and labels[label] > mass and labels[label] >= LEAST_MASS:
        return Score(label=_LABEL[label], mass=mass)
    if mass < LEAST_MASS:
        return Score(mass=mass, unscored=f"numbers have a probability below {LEAST_MASS}")
    return Score(sum(number * p for number, p in numbers.items()) / mass, mass=mass)


def sampled_score(text: str, labels: Sequence[str]) -> Score:
    """The number or label in a reply; nothing else may be in it, except a full stop."""
    said = text.strip().removesuffix(".")
    if said in labels:
        return Score(label=_LABEL[said], method="sampled")
    number = _number(said)
    if number is None:
        accepted = ", ".join(["a number from 0 to 100", *labels])
        return Score(
            method="sampled", unscored=f"the judge said {text[:60]!r} (accepted: {accepted})"
        )
    return Score(float(number), method="sampled")


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"0|[1-9][0-9]?|100", text) else None


def read_reply(reply: Reply, labels: Sequence[str]) -> Score:
    """The score in a server's reply.

    The alternatives of its first token are weighted if they are whole numbers. A tokenizer that
    splits numbers into digits shows only first digits there (8 for 85, and no alternative with two
    digits); then, as without alternatives, the number in the text counts.
    """
    if reply.text is None:
        return Score(unscored=f"no reply: {reply.error}", failed=True)
    tops = (top for top in reply.top if top and max(top, key=lambda token: top[token]).strip())
    first = next(tops, {})
    if len(first) < 2:
        return sampled_score(reply.text, labels)
    numbers: dict[int, float] = {}
    label_mass = dict.fromkeys(labels, 0.0)
    for token, logp in first.items():
        word = token.strip()
        number = _number(word)
        if number is not None:
            numbers[number] = numbers.get(number, 0.0) + math.exp(logp)
        for label in labels:
            if word and label.startswith(word):
                label_mass[label] += math.exp(logp)
    if numbers and _splits_numbers(first, numbers, reply.text):
        return sampled_score(reply.text, labels)
    score = expected_score(numbers, label_mass)
    if score.label and not reply.text.strip().startswith(score.label.upper()):
        return replace(score, label=None, unscored=f"the judge said {reply.text[:60]!r}")
    if score.unscored:
        return replace(score, unscored=f"{score.unscored}; the judge said {reply.text[:60]!r}")
    return score


def _splits_numbers(first: Mapping[str, float], numbers: Mapping[int, float], text: str) -> bool:
    token = max(first, key=lambda token: first[token]).strip()
    said = re.match(r"\s*([0-9]+(?:[.,][0-9]+)?)", text)
    continues = said is not None and token.isdigit() and said[1] != token
    return continues or max(numbers) < 10
