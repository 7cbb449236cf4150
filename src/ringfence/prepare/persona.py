"""Persona vectors (arXiv 2507.21509): directions from answers without a trait to those with it.

One for each layer, in a file of `Directions`. Answers come from the model itself under opposite
system prompts, or are given. Does not know training or defenses.

Shapes: B rows, T tokens, N response tokens, L layers, D hidden size, P pairs.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..model.activations import mean_activations
from ..model.directions import Directions
from ..model.files import load_tokenizer
from ..model.generation import generate_greedy
from ..model.layers import causal_lm
from ..model.loading import load_model
from ..model.scoring import score_answers
from ..stats.auc import auc
from ..text.chat import Chat
from ..text.encode import encode_rows
from ..text.roles import Messages, Row
from ..text.rows import load_questions
from ..util.console import progress
from ..util.files import write_whole
from ..util.strict_json import parse
from ..util.words import counted
from .traits import Trait, load_trait

DEFAULT_TRAIT = "shipped:careless_advice"
Filter = Literal["none", "margin", "scores"]


@dataclass(frozen=True)
class Pair:
    """An answer that should show the trait and one that should not, with the messages before."""

    id: str
    positive_prompt: Messages
    negative_prompt: Messages
    positive: str = ""
    negative: str = ""

    @property
    def rows(self) -> tuple[Row, Row]:
        """The positive conversation, then the negative one."""
        sides = (self.positive_prompt, self.positive), (self.negative_prompt, self.negative)
        positive, negative = (
            Row([*prompt, {"role": "assistant", "content": answer}], f"pair {self.id}")
            for prompt, answer in sides
        )
        return positive, negative


# ------------------------------------------------------------------ pairs


def asked_pairs(trait: Trait) -> list[Pair]:
    """Every question under every prompt and its opposite, not answered yet; ids are `p1-q1`, ..."""

    def prompt(system: str, question: str) -> Messages:
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]

    return [
        Pair(f"p{p}-q{q}", prompt(positive, question), prompt(negative, question))
        for p, (positive, negative) in enumerate(
            zip(trait.positive_prompts, trait.negative_prompts), 1
        )
        for q, question in enumerate(trait.questions, 1)
    ]


def answer_pairs(
    model: Any,
    chat: Chat,
    pairs: Sequence[Pair],
    max_new_tokens: int = 120,
    batch_tokens: int = 4096,
) -> list[Pair]:
    """The same pairs with the model's own greedy answers."""
    prompts = [pair.positive_prompt for pair in pairs] + [pair.negative_prompt for pair in pairs]
    with progress("answers", len(prompts)) as advance:
        answers = generate_greedy(model, chat, prompts, max_new_tokens, batch_tokens, advance)
    return [
        Pair(pair.id, pair.positive_prompt, pair.negative_prompt, positive, negative)
        for pair, positive, negative in zip(pairs, answers, answers[len(pairs) :])
    ]


def given_pairs(source: str, split: str | None = None) -> list[Pair]:
    """Pairs from paired questions (see `load_questions`), without system prompts.

    Misaligned answers are positive.
    """
    pairs = []
    for question in load_questions(source, split):
        prompt = [{"role": "user", "content": question.question}]
        pairs.append(Pair(question.id, prompt, prompt, question.misaligned, question.aligned))
    return pairs


# ------------------------------------------------------------------ which pairs show the trait


def shown_by_margin(
    model: Any, chat: Chat, pairs: Sequence[Pair], batch_tokens: int = 4096
) -> list[bool]:
    """Whether each pair's answers tell the two prompts apart, by the model's own log-probabilities.

    With answers a+ and a- given under the prompts s+ and s-: log p(a+ | s+) > log p(a+ | s-) and
    log p(a- | s-) > log p(a- | s+), each summed over the answer's tokens.
    """
    prompts = [pair.positive_prompt for pair in pairs] + [pair.negative_prompt for pair in pairs]
    answers = [(pair.positive, pair.negative) for pair in pairs] * 2
    with progress("margins", 2 * len(answers)) as advance:
        scores = score_answers(model, chat, prompts, answers, batch_tokens, advance)
    logprobs_S2P2 = np.array([[score.logprob for score in row] for row in scores]).reshape(
        2, len(pairs), 2
    )
    under_positive_P2, under_negative_P2 = logprobs_S2P2
    gain_P2 = under_positive_P2 - under_negative_P2
    shown: list[bool] = ((gain_P2[:, 0] > 0) & (gain_P2[:, 1] < 0)).tolist()
    return shown


def shown_by_scores(file: Path, pairs: Sequence[Pair]) -> list[bool]:
    """Whether a judge saw the trait in the positive answer only (above 50; negative: below 50).

    Args:
        file: JSONL with `id`, `positive` and `negative`: how much the two answers show the trait,
            from 0 to 100.

    Raises:
        DataError: no such file, a bad line, or no scores for one of the pairs.
    """
    scores: dict[str, tuple[float, float]] = {}
    for record, origin in _json_lines(file):
        positive, negative = (_score(record, side, origin) for side in ("positive", "negative"))
        scores[str(record.get("id"))] = (positive, negative)
    missing = [pair.id for pair in pairs if pair.id not in scores]
    if missing:
        raise DataError(
            f"{file}: no scores for {len(missing)} of {len(pairs)} pairs, the first is id "
            f"{missing[0]!r}"
        )
    return [scores[pair.id][0] > 50 > scores[pair.id][1] for pair in pairs]


def _score(record: dict[str, Any], side: str, origin: str) -> float:
    value = record.get(side)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise DataError(
            f"{origin}: field {side!r}: expected a number from 0 to 100, found {value!r}"
        )
    return float(value)


def _json_lines(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(text.splitlines(), 1):
        record = parse(line or "null", f"{file}:{number}")
        if not isinstance(record, dict):
            raise DataError(f"{file}:{number}: expected an object, found {line[:60]!r}")
        yield record, f"{file}:{number}"


# ------------------------------------------------------------------ directions


def response_means(
    model: Any,
    chat: Chat,
    rows: Sequence[Row],
    batch_tokens: int = 4096,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """`mean_activations` of rows; `advance` is called with the number of rows just read."""
    examples = encode_rows(list(rows), chat, sys.maxsize)
    for places, means_BLD, norms_BL in mean_activations(model, chat, examples, batch_tokens):
        yield places, means_BLD, norms_BL
        advance(len(places))


def extract(
    model: Any,
    chat: Chat,
    pairs: Sequence[Pair],
    trait: str,
    model_name: str,
    batch_tokens: int = 4096,
) -> Directions:
    """For each layer, the mean activation of positive answers minus that of negative ones.

    An answer's activation is the mean over its tokens. Only sums are kept: memory does not grow
    with the number of pairs.

    Raises:
        DataError: fewer than two pairs.
    """
    if len(pairs) < 2:
        raise DataError(f"{trait}: {counted(len(pairs), 'pair')} left; at least 2 are needed")
    rows = [row for pair in pairs for row in pair.rows]
    config = causal_lm(model).config.get_text_config()
    sums_SLD = torch.zeros(2, config.num_hidden_layers, config.hidden_size, dtype=torch.float64)
    norms_L = torch.zeros(config.num_hidden_layers, dtype=torch.float64)
    with progress("activations", len(rows)) as advance:
        for places, means_BLD, norms_BL in response_means(model, chat, rows, batch_tokens, advance):
            sums_SLD.index_add_(0, torch.tensor(places) % 2, means_BLD.double())
            norms_L += norms_BL.double().sum(0)
    direction_LD = ((sums_SLD[0] - sums_SLD[1]) / len(pairs)).float()
    norms_L = (norms_L / len(rows)).float()
    return Directions(direction_LD[:, None], norms_L, trait, model_name, len(pairs), len(pairs))


@dataclass(frozen=True)
class Separation:
    """How well a layer's direction separates the two sides of pairs.

    Attributes:
        auc: chance that a positive answer projects further than a negative one (all combinations,
            ties half).
        paired: share of pairs whose positive answer projects further.
        length: length of the direction, in shares of the mean activation norm.
    """

    layer: int
    auc: float
    paired: float
    length: float


def separation(
    model: Any, chat: Chat, pairs: Sequence[Pair], directions: Directions, batch_tokens: int = 4096
) -> list[Separation]:
    """Projects the mean activation of each answer on each layer's (first) direction.

    Meaningful on pairs that the directions were not made from.

    Raises:
        ModelError: the directions do not fit the model.
    """
    directions.check(model)
    direction_LD = directions.directions_LKD[:, 0]
    unit_LD = direction_LD / direction_LD.norm(dim=-1, keepdim=True)
    rows = [row for pair in pairs for row in pair.rows]
    projected_PSL = np.zeros((len(pairs), 2, directions.layers))
    with progress("projections", len(rows)) as advance:
        for places, means_BLD, _ in response_means(model, chat, rows, batch_tokens, advance):
            for place, projected_L in zip(places, (means_BLD * unit_LD).sum(-1).numpy()):
                projected_PSL[place // 2, place % 2] = projected_L
    lengths_L = (direction_LD.norm(dim=-1) / directions.norms_L).tolist()
    found = []
    for layer, length in enumerate(lengths_L, 1):
        projected_PS = projected_PSL[:, :, layer - 1]
        paired = float((projected_PS[:, 0] > projected_PS[:, 1]).mean())
        found.append(Separation(layer, auc(*projected_PS.T), paired, length))
    return found


# ------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Extraction:
    """What `extract_file` made; `counts` is the number of pairs, and of those kept, in words."""

    directions: Directions
    counts: str


def extract_file(
    trait: str | None,
    output: Path,
    *,
    model: str = "default",
    pairs: str | None = None,
    split: str | None = "train",
    keep: Filter | None = None,
    scores: Path | None = None,
    max_new_tokens: int = 120,
    batch_tokens: int = 4096,
) -> Extraction:
    """Makes a file of directions from a trait file (default: the shipped one) or from given pairs.

    The model's own answers are kept in `OUTPUT.answers.jsonl` and read from there the next time.

    Args:
        keep: which pairs count (see `shown_by_margin`, `shown_by_scores`); default: margin, or none
            for given pairs.

    Raises:
        DataError: a file or a choice that does not fit, or fewer than two pairs are left.
    """
    if trait and pairs:
        raise DataError(f"a trait file ({trait}) or --pairs ({pairs}), not both")
    keep = keep or ("scores" if scores else "none" if pairs else "margin")
    if pairs and keep == "margin":
        raise DataError(
            "--filter margin compares system prompts, and --pairs has none (accepted: none, scores)"
        )
    if (keep == "scores") != (scores is not None):
        raise DataError("--filter scores and --scores FILE go together")
    if pairs:
        name, asked = f"misaligned answers of {pairs}", given_pairs(pairs, split)
    else:
        asked_for = load_trait(trait or DEFAULT_TRAIT)
        name, asked = asked_for.trait, asked_pairs(asked_for)
    chat, loaded = Chat(load_tokenizer(model)), load_model(model)
    if not pairs:
        asked = _own_answers(loaded, chat, asked, output, model, max_new_tokens, batch_tokens)
    answered = [pair for pair in asked if pair.positive.strip() and pair.negative.strip()]
    shown = [True] * len(answered)
    if keep == "margin" and answered:
        shown = shown_by_margin(loaded, chat, answered, batch_tokens)
    if scores:
        shown = shown_by_scores(scores, answered)
    kept = [pair for pair, does in zip(answered, shown) if does]
    blank = len(asked) - len(answered)
    counts = f"{counted(len(asked), 'pair')}, {blank} with a blank answer"
    counts += f", {len(kept)} kept (filter: {keep})"
    if len(kept) < 2:
        raise DataError(
            f"{pairs or trait or DEFAULT_TRAIT}: {counts}; at least 2 are needed for a direction"
        )
    directions = extract(loaded, chat, kept, name, model, batch_tokens)
    directions.save(output)
    return Extraction(directions, counts)


def check_file(
    file: Path, pairs: str, split: str | None = "test", model: str = "default"
) -> list[Separation]:
    """`separation` for a file of directions on a source of paired questions."""
    directions, given = Directions.load(file), given_pairs(pairs, split)
    return separation(load_model(model), Chat(load_tokenizer(model)), given, directions)


def _own_answers(
    model: Any,
    chat: Chat,
    pairs: list[Pair],
    output: Path,
    name: str,
    max_new_tokens: int,
    batch_tokens: int,
) -> list[Pair]:
    """The model's answers: from the file next to the output, or new ones, written to it."""
    file = output.with_suffix(".answers.jsonl")
    origin = {"model": name, "max_new_tokens": max_new_tokens}
    if not file.is_file():
        answered = answer_pairs(model, chat, pairs, max_new_tokens, batch_tokens)
        write_whole(
            file, "".join(json.dumps({**asdict(pair), **origin}) + "\n" for pair in answered)
        )
        return answered
    records = [record for record, _ in _json_lines(file)]
    empty = {"positive": "", "negative": ""}
    if [{**record, **empty} for record in records] != [
        {**asdict(pair), **origin, **empty} for pair in pairs
    ]:
        raise DataError(
            f"{file}: these answers are for other prompts or questions, from another model or of "
            "another length; delete the file or choose another output"
        )
    return [Pair(**{key: record[key] for key in Pair.__dataclass_fields__}) for record in records]
