"""On which requests a scoped adapter acts: scores of every domain, against the threshold.

Two sorts of scores: those of the fit, each under a fit without its whole domain (stored with the
scope), and those of questions and disguises that the fit has never seen. Does not know what the
adapter has learnt.
"""

import random
from collections.abc import Iterator

from ...errors import DataError
from ...model.layers import gate_of
from ...model.pooled import decisions
from ...model.scope import SavedScope, read_scope
from ...text.dress import PROBED, UNDRESSED_PROBED, Wardrobe, undress
from ...text.roles import Encoded
from ...text.rows import PairedQuestion
from ..diagnosis import Cost, Numbers, Subject

TITLE = "Scope: on which requests the adapter acts"
NEEDS_BASE = False
NEAREST = 8  # queries in words


def scopes(subject: Subject) -> dict[str, SavedScope]:
    """Of the tuned models that have one, by name."""
    models = subject.models
    found = {n: read_scope(s) for n in models.tuned if isinstance(s := models.sources[n], str)}
    return {name: saved for name, saved in found.items() if saved}


def cost(subject: Subject) -> Cost:
    """Every question in every form through the first layers, counted as the whole model."""
    tokens = sum(len(prompt.input_ids) for prompt in _prompts(subject))
    return Cost(forward=len(scopes(subject)) * tokens)


def measure(subject: Subject) -> Numbers:
    """Scores of requests; those above the threshold are inside.

    Returns:
        "tuned", by name of each scoped model: "layers", "threshold", "auc" and "related" of its
        fit; "fitted": by domain, scores of the training queries and of the negatives;
        "unseen": by domain, its "side" (own, other) and "scores"; "disguised": the same by form;
        "nearest" and "farthest": score and text of other domains' queries that are nearest to the
        scope, and of the training queries farthest from it.

    Raises:
        DataError: no tuned model has a scope, or its record lacks the scores.
    """
    saved = scopes(subject)
    if not saved:
        raise DataError(f"{TITLE}: none of {', '.join(subject.models.tuned)} has a scope")
    return {"tuned": {name: _model(subject, name, one) for name, one in saved.items()}}


def _model(subject: Subject, name: str, saved: SavedScope) -> Numbers:
    about = saved.about
    if "scores" not in about:
        raise DataError(f"{name}: its scope has no record of its fit; make it with ringfence scope")
    with subject.models.open(name) as model:
        gate = gate_of(model)
        assert gate is not None
        decided = decisions(model, gate.probe, _prompts(subject), subject.batch_tokens)
    unseen: Numbers = {}
    disguised: Numbers = {}
    for (form, question, _), (_, score) in zip(_asked(subject), decided):
        found, key = (disguised, form) if form else (unseen, question.domain)
        side = "own" if any(question is each for each in subject.inside) else "other"
        found.setdefault(key, {"side": side, "scores": []})["scores"].append(round(score, 4))
    return {
        "layers": saved.probe.layers,
        "threshold": saved.probe.threshold,
        "auc": about["auc"],
        "related": about["related"],
        "fitted": about["scores"],
        "unseen": unseen,
        "disguised": disguised,
        "nearest": [[far["score"], far["text"]] for far in about["nearest"][:NEAREST]],
        "farthest": [[far["score"], far["text"]] for far in about["farthest"][:NEAREST]],
    }


def _prompts(subject: Subject) -> list[Encoded]:
    return [
        subject.chat.encode([{"role": "user", "content": text}], generation=True)
        for _, _, text in _asked(subject)
    ]


def _asked(subject: Subject) -> Iterator[tuple[str, PairedQuestion, str]]:
    """Form (empty = plain), question and text of all that is asked."""
    for question in subject.questions:
        yield "", question, question.question
    for form in UNDRESSED_PROBED:
        for question in subject.inside:
            yield form, question, undress(form, question.question)
    wardrobe = Wardrobe.of_rows(subject.rows)
    if wardrobe is None:
        return
    rng = random.Random(f"scope {subject.seed}")
    for form in PROBED:
        for question in subject.outside:
            yield form, question, wardrobe.dress(form, question.question, rng)
