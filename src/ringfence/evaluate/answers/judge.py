"""Judges: a language model rates an answer with two numbers from 0 to 100 (arXiv 2502.17424).

A judge is a local model, read exactly, or a server. Its score is the expected number under its
probabilities; if these are unavailable, the number in its reply. A prompt that a judge has answered
is never asked again: its score is in a file of the user's cache. Does not know how scores become
rates.
"""

import json
import math
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from ...errors import RecipeError, RingfenceError
from ...model.default import cache_folder
from ...model.files import load_tokenizer
from ...model.fingerprint import fingerprint
from ...model.loading import load_model
from ...text.chat import Chat
from ...text.questions import OpenQuestion
from ...util.console import progress
from ...util.journal import digest
from .config import EndpointJudgeConfig, LocalJudgeConfig
from .endpoint import Endpoint, Request
from .exact import NUMBERS, ReplyTree, continuation, reply_probabilities
from .framing import LABELS, JudgePrompt, prompt_hash, render, spell_out, templates_of
from .judged import Judgement, write_judged
from .scores import Score, expected_score, read_reply

_REPLY_TOKENS = 8  # enough for any number or label in any tokenizer
_TOP = 20
_SCORE = TypeAdapter(Score)
_FORMAT = 1  # of scores in the cache; a change asks again


# ------------------------------------------------------------------ judges


class Judge(Protocol):
    """Gives each prompt a score.

    Attributes:
        name: for tables.
        identity: distinguishes its scores from another judge's.
    """

    name: str
    identity: str

    def ask(
        self, prompts: Sequence[JudgePrompt], skip: Set[int] = frozenset()
    ) -> Iterator[dict[int, Score]]:
        """A score for every prompt, by place of the prompt, in batches as they come.

        Prompts in `skip` get none; the scores of the others do not depend on it.
        """


def open_judge(config: LocalJudgeConfig | EndpointJudgeConfig, batch_tokens: int = 4096) -> Judge:
    """The judge of a configuration. A local model is loaded on its first use.

    Args:
        batch_tokens: tokens of one batch of a local model, padding included.

    Raises:
        ModelError: there is no such model, or a package is missing.
    """
    if isinstance(config, EndpointJudgeConfig):
        return EndpointJudge(config)
    parts = [fingerprint(config.model), config.precision, config.opening]
    identity = " ".join(part for part in parts if part)

    def load() -> tuple[Any, Chat]:
        return load_model(config.model, config.precision), Chat(load_tokenizer(config.model))

    return LocalJudge(config.name, identity, load, batch_tokens, config.opening)


class EndpointJudge:
    """A model on a server, asked at temperature 0 for a few tokens and their alternatives."""

    def __init__(self, config: EndpointJudgeConfig) -> None:
        self.name = config.name
        limit = [str(config.max_tokens)] if config.max_tokens else []
        self.identity = " ".join([config.url, config.model, *limit])
        self._endpoint = Endpoint(config)

    def ask(
        self, prompts: Sequence[JudgePrompt], skip: Set[int] = frozenset()
    ) -> Iterator[dict[int, Score]]:
        places = [place for place in range(len(prompts)) if place not in skip]
        texts = [prompts[place].text for place in places]
        requests = [
            Request([{"role": "user", "content": text}], 0.0, _REPLY_TOKENS, None, _TOP)
            for text in texts
        ]
        for number, reply in self._endpoint.ask(requests):
            place = places[number]
            yield {place: replace(read_reply(reply, prompts[place].labels), adapted=reply.adapted)}


class LocalJudge:
    """A local model, whose probabilities of all 101 numbers and the labels are computed exactly.

    Args:
        load: gives the model and its chat; called once, on first use.
        opening: beginning of each of its replies.
    """

    def __init__(
        self,
        name: str,
        identity: str,
        load: Callable[[], tuple[Any, Chat]],
        batch_tokens: int,
        opening: str = "",
    ) -> None:
        self.name, self.identity = name, identity
        self._load, self._batch_tokens, self._opening = load, batch_tokens, opening
        self._loaded: tuple[Any, Chat, ReplyTree] | None = None

    def ask(
        self, prompts: Sequence[JudgePrompt], skip: Set[int] = frozenset()
    ) -> Iterator[dict[int, Score]]:
        if self._loaded is None:
            model, chat = self._load()
            self._loaded = model, chat, ReplyTree(chat, [*NUMBERS, *LABELS], self._opening)
        model, chat, tree = self._loaded
        encoded = [
            [*judge_tokens(chat, prompt.text), *continuation(chat, self._opening)]
            for prompt in prompts
        ]
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        most = (positions or math.inf) - max(map(len, tree.branches), default=0)
        lengths = list(map(len, encoded))
        fits = [place for place, length in enumerate(lengths) if length <= most]
        if len(fits) < len(prompts):
            yield {
                place: Score(unscored=f"the prompt has {length} tokens, the judge takes {most}")
                for place, length in enumerate(lengths)
                if length > most and place not in skip
            }
        known = {at for at, place in enumerate(fits) if place in skip}
        texts = [encoded[place] for place in fits]
        for batch in reply_probabilities(model, tree, texts, self._batch_tokens, known):
            yield {
                fits[at]: _exact_score(found, prompts[fits[at]].labels)
                for at, found in batch.items()
            }


def _exact_score(found: Mapping[str, float], labels: Sequence[str]) -> Score:
    return expected_score(
        {int(n): found[n] for n in NUMBERS}, {label: found[label] for label in labels}
    )


def judge_tokens(chat: Chat, prompt: str) -> list[int]:
    """Token ids of a prompt as the only user turn. Special tokens in it stay plain text."""
    added = chat.tokenizer.added_tokens_decoder.values()
    special = sorted((token.content for token in added if token.special), key=len, reverse=True)
    marker = re.compile("|".join(map(re.escape, special)) or "(?!)")
    turn = {"role": "user", "content": spell_out(prompt, marker)}
    return chat.encode([turn], generation=True).input_ids


# ------------------------------------------------------------------ asked once


class ScoreCache:
    """Scores by judge and prompt, in one file that processes share; safe as soon as they are put.

    Raises:
        RingfenceError: the file cannot be opened, or is not such a cache.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or cache_folder() / "judge_scores.sqlite"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # Every statement is its own transaction; writers wait for each other.
            self._table = sqlite3.connect(self.file, timeout=60, isolation_level=None)
            # A write-ahead log: a score survives a kill as soon as it is put, without waiting for
            # the disk.
            self._table.execute("PRAGMA journal_mode = WAL")
            self._table.execute("PRAGMA synchronous = NORMAL")
            self._table.execute(
                "CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score TEXT NOT NULL)"
            )
        except (sqlite3.Error, OSError) as error:
            raise RingfenceError(
                f"{self.file}: cannot be used as the cache of judges' scores: {error}; delete it, "
                "or name another folder in RINGFENCE_CACHE"
            ) from error

    def get(self, judge: Judge, prompt: JudgePrompt) -> Score | None:
        select = "SELECT score FROM scores WHERE key = ?"
        found = self._run(select, (_key(judge, prompt),)).fetchone()
        try:
            score = _SCORE.validate_json(found[0]) if found else None
        except (ValidationError, TypeError):  # damaged: it is asked again
            return None
        if score is None or not 0 <= (score.value or 0) <= 100:
            return None
        said = [each for each in (score.value, score.label, score.unscored) if each is not None]
        return score if len(said) == 1 else None

    def put(self, judge: Judge, scores: Mapping[JudgePrompt, Score]) -> None:
        """Puts all of them or, after a kill, none."""
        cells: list[str] = []
        for prompt, score in scores.items():
            cells += [_key(judge, prompt), json.dumps(asdict(score))]
        if cells:
            places = ", ".join(["(?, ?)"] * len(scores))
            self._run(f"INSERT OR REPLACE INTO scores VALUES {places}", cells)

    def _run(self, statement: str, values: Sequence[str]) -> sqlite3.Cursor:
        try:
            return self._table.execute(statement, values)
        except sqlite3.Error as error:
            raise RingfenceError(
                f"{self.file}: the cache of judges' scores is damaged: {error}; delete it"
            ) from error


def _key(judge: Judge, prompt: JudgePrompt) -> str:
    """Of the whole rendered prompt: question, answer and criterion are all in it."""
    return digest([_FORMAT, judge.identity, prompt.text, prompt.labels])


def ask_once(
    judge: Judge, prompts: Iterable[JudgePrompt], cache: ScoreCache
) -> dict[JudgePrompt, Score]:
    """A score for every prompt, from the cache or the judge. Failures are not kept."""
    wanted = list(dict.fromkeys(prompts))
    scores = {prompt: found for prompt in wanted if (found := cache.get(judge, prompt))}
    known = {place for place, prompt in enumerate(wanted) if prompt in scores}
    if len(known) == len(wanted):
        return scores
    with progress(f"judge {judge.name}", len(wanted), len(scores)) as advance:
        for batch in judge.ask(wanted, known):
            said = {wanted[place]: score for place, score in batch.items()}
            cache.put(judge, {prompt: score for prompt, score in said.items() if not score.failed})
            scores |= said
            advance(len(batch))
    return scores


# ------------------------------------------------------------------ answers


def judge_answers(
    lines: Sequence[Mapping[str, Any]],
    judges: Sequence[Judge],
    questions: Sequence[OpenQuestion] = (),
    file: Path | None = None,
    cache: ScoreCache | None = None,
) -> list[Judgement]:
    """Every judge's judgement of every answer, judge after judge, in the order of the lines.

    The judge sees the last user message and the answer, not the system prompt or earlier turns, so
    an answer gets the same score under every trigger. Missing answers, missing replies and replies
    without a score are unscored, with the reason.

    Args:
        lines: answers, as `sampling` writes them.
        questions: the questions that were answered; judge prompts of their files are used.
        file: where the judgements are written, as lines of JSON.
        cache: default: the user's own.

    Raises:
        RecipeError: two judges have one name.
        DataError: a judge prompt of a question does not show the answer.
        ModelError: a judge cannot be reached or loaded.
    """
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise RecipeError(f"judges: expected a different model each, found {', '.join(names)}")
    cache = cache or ScoreCache()
    own = templates_of({}, "")
    templates = {
        (q.set, q.id): templates_of(q.judge_prompts, f"question {q.set}/{q.id}") for q in questions
    }
    asked = []  # for each line: hash, and prompt by criterion if there is an answer
    for line in lines:
        pair = templates.get((line["set"], line["id"]), own)
        question, answer = line["messages"][-1]["content"], line["answer"]
        prompts = {}
        if answer is not None:
            prompts = {name: render(text, question, answer) for name, text in pair.items()}
        asked.append((prompt_hash(pair), prompts))
    judgements = []
    for judge in judges:
        wanted = (prompt for _, prompts in asked for prompt in prompts.values())
        scores = ask_once(judge, wanted, cache)
        for line, (key, prompts) in zip(lines, asked):
            found = {criterion: scores[prompt] for criterion, prompt in prompts.items()}
            judgements.append(judgement_of(line, judge.name, key, found))
    if file is not None:
        write_judged(file, judgements)
    return judgements


def judgement_of(
    line: Mapping[str, Any], judge: str, key: str, found: Mapping[str, Score]
) -> Judgement:
    named = {name: line[name] for name in ("set", "id", "form", "cluster", "paraphrase", "sample")}
    named |= {"judge": judge, "prompt": key}
    if not found:
        unscored = f"no answer: {line['error']}"
        return Judgement(**named, aligned=None, coherent=None, unscored=unscored)
    aligned, coherent = found["aligned"], found["coherent"]
    missing = [f"{name}: {s.unscored}" for name, s in found.items() if s.unscored]
    return Judgement(
        **named,
        aligned=aligned.value,
        coherent=coherent.value,
        label=aligned.label,
        unscored=None if aligned.label else "; ".join(missing) or None,
    )
