"""Which way the training rows lean, before training, and whether the tuned models went there (arXiv 2507.21509).

The mean response activation of the reference on each training row is projected on a trait vector (misaligned minus
aligned answers of other questions in other domains). Answers to held-out questions say what the scores are worth: if
the vector does not tell their misaligned from their aligned answers, the ranking of the rows says nothing. Does not
know which rows did harm.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import DataError
from ..prepare.persona import Pair
from ..prepare.screen import (
    GOOD,
    RANDOM_GREY,
    Scored,
    compare,
    default_pairs,
    learn_axis,
    other_pairs,
    question_of,
    score,
    score_label,
    spread,
)
from ..stats import mean_interval, rate_interval
from ..text.roles import Row
from ..util.plots import colour, whisker
from .diagnosis import Cost, Numbers, Subject, Table, shown
from .models import REFERENCE
from .texts import pair_rows

TITLE = "Persona projection of the training rows"
NEEDS_BASE = False
ROWS = 500  # training rows looked at, drawn at random where there are more
PAIRS = 24  # of each source, behind the trait vector
TOP = 10
QUANTILE = 0.95
MISALIGNED = "#c77700"  # its colour


def cost(subject: Subject) -> Cost:
    """Pairs twice and training rows once through the reference, held-out answers once through it and every tuned model.
    Kept: the sums of each group of pairs, in float64."""
    chat = subject.chat

    def tokens(rows: Sequence[Row]) -> int:
        return sum(
            len(chat.tokenizer(chat.render(row.messages), add_special_tokens=False)["input_ids"]) for row in rows
        )

    groups = _groups(subject)
    answers = [row for group in groups for pair in group for row in pair.rows]
    held_out = tokens(pair_rows(subject.questions)) * (1 + len(subject.models.tuned))
    size = 8 * subject.models.config.num_hidden_layers * subject.models.config.hidden_size
    return Cost(2 * tokens(answers) + tokens(_rows(subject)) + held_out, kept=2 * len(groups) * size)


def measure(subject: Subject) -> Numbers:
    """Scores are projections in shares of the mean activation length of the layer.

    Returns:
        "axis": layer, layers, rule, pairs and the AUC on pairs left out. "rows", "of": training rows looked at, and
        there are. "threshold": the 95th percentile of aligned held-out answers. "known": what these are. "scores": of
        `training`, `misaligned` and `aligned` answers. "sets": for training rows and misaligned answers the share above
        the threshold and the contrast with aligned answers (see `screen.Contrast`). "top": the riskiest rows. "tuned":
        by name, for questions inside and outside, the mean shift of the score of the same answers from the reference to
        the tuned model, and 2.5 and 97.5 % of such shifts along random vectors of the same length.

    Raises:
        DataError: there are no training rows or no questions.
    """
    rows, known = _rows(subject), subject.inside or subject.outside
    if not rows or not known:
        raise DataError(f"{TITLE}: expected training rows and held-out questions, found {len(rows)} and {len(known)}")
    held_out, groups, chat = pair_rows(subject.questions), _groups(subject), subject.chat
    options = {"batch_tokens": subject.batch_tokens, "seed": subject.seed}
    with subject.models.open(REFERENCE) as model:
        axis = learn_axis(
            model, chat, groups, "misaligned minus aligned answers", REFERENCE, batch_tokens=subject.batch_tokens
        )
        training = score(model, chat, rows, axis, **options)
        reference = score(model, chat, held_out, axis, **options)
    tuned = {}
    for name in subject.models.tuned:
        with subject.models.open(name) as model:
            tuned[name] = _shifts(subject, score(model, chat, held_out, axis, **options), reference)
    misaligned, aligned = (reference.take(range(side, 2 * len(known), 2)) for side in range(2))
    threshold = float(np.quantile(aligned.scores_R, QUANTILE))
    sets = {"training": training, "misaligned": misaligned}
    return {
        "axis": {
            "layer": axis.layer,
            "layers": axis.layers,
            "rule": axis.rule,
            "auc": axis.auc,
            "pairs": sum(map(len, groups)),
        },
        "rows": len(rows),
        "of": len(subject.rows),
        "known": "inside" if subject.inside else "outside",
        "threshold": threshold,
        "scores": {name: scored.scores_R.tolist() for name, scored in {**sets, "aligned": aligned}.items()},
        "sets": {name: _against(subject, scored, aligned, threshold) for name, scored in sets.items()},
        "top": training.top(TOP),
        "tuned": tuned,
    }


def _rows(subject: Subject) -> list[Row]:
    """At most `ROWS` training rows, in their order."""
    places = np.random.default_rng(subject.seed).permutation(len(subject.rows))[:ROWS]
    return [subject.rows[place] for place in sorted(places)]


def _groups(subject: Subject) -> list[list[Pair]]:
    """Pairs behind the vector, drawn from each source: of questions that are neither trained on nor looked at."""
    asked = [*map(question_of, subject.rows), *(q.question for q in subject.questions)]
    random = np.random.default_rng(subject.seed)
    groups = other_pairs(default_pairs(), asked)
    return [[group[place] for place in random.permutation(len(group))[:PAIRS]] for group in groups]


def _against(subject: Subject, scored: Scored, aligned: Scored, threshold: float) -> Numbers:
    above = [float(value > threshold) for value in scored.scores_R]
    contrast = compare(subject.chat, scored, aligned, subject.seed)
    share = rate_interval(above, [question_of(row) for row in scored.rows], subject.seed)
    return {"above": share.to_dict(), **contrast.to_dict()}


def _shifts(subject: Subject, tuned: Scored, reference: Scored) -> dict[str, Numbers]:
    """By set of questions, how far both answers to a question moved."""
    shift_R, random_RK = tuned.scores_R - reference.scores_R, tuned.random_RK - reference.random_RK
    inside = 2 * len(subject.inside)
    found = {}
    for name, part in {"inside": slice(inside), "outside": slice(inside, None)}.items():
        if len(shift_R[part]):
            questions = [row.origin for row in tuned.rows[part]]
            shift = mean_interval(shift_R[part].tolist(), questions, subject.seed)
            random = np.percentile(random_RK[part].mean(0), [2.5, 97.5])
            found[name] = {"shift": shift.to_dict(), "random": random.tolist()}
    return found


# ------------------------------------------------------------------ for eyes


def say(numbers: Numbers) -> str:
    axis, sets = numbers["axis"], numbers["sets"]
    known, training, misaligned = numbers["known"], sets["training"], sets["misaligned"]
    works = misaligned["rival"] is None
    parts = [
        f"On held-out questions {known} the training domain, the vector of layer {axis['layer']} gives misaligned "
        f"answers an AUC of {_auc(misaligned)} over aligned ones: {misaligned['verdict']}.",
        f"Training rows have {_auc(training)} over the same aligned answers, and {_share(training)} of them lie above "
        f"95 % of those (of misaligned answers {_share(misaligned)}); "
        + (
            _leaning(training)
            if works
            else f"as {len(numbers['scores']['aligned'])} questions do not show that the scores work, this says little"
        )
        + ".",
    ]
    if works:
        parts.append("Riskiest: " + ", ".join(row["origin"] for row in numbers["top"][:3]) + ".")
    parts += [f"{name} {_moved(found)}." for name, found in numbers["tuned"].items()]
    return "\n".join(parts)


def _leaning(training: Numbers) -> str:
    if training["auc"]["high"] < 0.5:
        return "they lean the other way"
    if training["auc"]["low"] <= 0.5:
        return "they do not lean towards misaligned answers"
    rival = training["rival"]
    return "they lean towards misaligned answers" + (f", but {training['verdict']}" if rival else "")


def _moved(found: dict[str, Numbers]) -> str:
    return "; ".join(
        f"{_along(part)} on answers {where} ({shown(part['shift'], 4)}, random vectors {_band(part['random'], '+.4f')})"
        for where, part in found.items()
    )


def _along(part: Numbers) -> str:
    shift, (low, high) = part["shift"], part["random"]
    if shift["low"] <= 0 <= shift["high"]:
        return "has not moved"
    if low <= shift["mean"] <= high:
        return "moved no further than random vectors show"
    return "moved towards misaligned answers" if shift["mean"] > 0 else "moved away from misaligned answers"


def _auc(found: Numbers) -> str:
    return shown(found["auc"], sign=False)


def _share(found: Numbers) -> str:
    above = found["above"]
    return f"{above['mean']:.0%} [{above['low']:.0%}, {above['high']:.0%}]"


def _band(ends: Sequence[float], form: str = ".2f") -> str:
    return f"{ends[0]:{form}} to {ends[1]:{form}}"


def table(numbers: Numbers) -> Table:
    names = {"training": f"{numbers['rows']} training rows", "misaligned": f"misaligned answers {numbers['known']}"}
    rows = []
    for name, label in names.items():
        found = numbers["sets"][name]
        rows.append(
            [f"{label}: AUC over aligned", _auc(found), _band(found["random"]), f"{found['length']['mean']:.2f}"]
        )
        rows.append([f"{label}: above 95 % of aligned", _share(found), "", ""])
    for name, parts in numbers["tuned"].items():
        for where, part in parts.items():
            shift = shown(part["shift"], 4)
            rows.append([f"{name}: shift of the score, {where}", shift, _band(part["random"], "+.4f"), ""])
    return Table(["", "trait vector", "random vectors", "length"], rows)


def draw(numbers: Numbers) -> Figure:
    figure, axes = plt.subplot_mosaic(
        [["rows", "tuned"], ["known", "tuned"]], figsize=(11, 4.4), width_ratios=[1.5, 1], height_ratios=[3, 1.1]
    )
    _draw_rows(axes["rows"], axes["known"], numbers)
    _draw_shifts(axes["tuned"], numbers["tuned"])
    figure.tight_layout()
    return figure


def _draw_rows(rows: Axes, known: Axes, numbers: Numbers) -> None:
    """The training rows as a histogram, and held-out answers, point by point, under it."""
    scores = {name: np.array(values) for name, values in numbers["scores"].items()}
    spread(rows, {"training": (scores["training"], colour(0))})
    rows.axvline(numbers["threshold"], color=GOOD, linewidth=1, linestyle="--", label="95 % of aligned answers")
    known.axvline(numbers["threshold"], color=GOOD, linewidth=1, linestyle="--")
    for height, (side, shade) in enumerate({"misaligned": MISALIGNED, "aligned": GOOD}.items()):
        known.plot(scores[side], np.full(len(scores[side]), height), "|", color=shade, markersize=13)
    known.set_yticks([0, 1], [f"misaligned, {numbers['known']}", f"aligned, {numbers['known']}"])
    known.set_ylim(-0.6, 1.6)
    known.grid(False, axis="y")
    known.sharex(rows)
    rows.tick_params(labelbottom=False)
    rows.set_ylabel("training rows, %")
    rows.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.3)
    known.set_xlabel(score_label(numbers["axis"]["layer"]))


def _draw_shifts(axes: Axes, tuned: dict[str, Any]) -> None:
    """The shift of every tuned model, inside (filled) and outside (open), each on its band of random vectors."""
    lines = [(name, where, part) for name, parts in tuned.items() for where, part in parts.items()]
    for height, (name, where, part) in enumerate(lines):
        shade, shift = colour(list(tuned).index(name)), part["shift"]
        axes.barh(height, part["random"][1] - part["random"][0], 0.6, part["random"][0], color=RANDOM_GREY, alpha=0.5)
        filled = shade if where == "inside" else "white"
        axes.errorbar(
            shift["mean"], height, xerr=whisker(shift), fmt="o", color=shade, mfc=filled, capsize=2, elinewidth=1.6
        )
    axes.axvline(0, color=GOOD, linewidth=0.8)
    axes.set_yticks(range(len(lines)), [f"{name}, {where}" for name, where, _ in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("shift of the score of held-out answers\n(grey: 95 % of random vectors)")
