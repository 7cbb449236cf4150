"""Answers to open questions in a model's own words, drawn locally or from an endpoint.

Every answer is at once a line of a journal, so a killed run can be resumed. Does not know judges.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ...errors import ChatError, DataError
from ...model.generation import DECODING, generate
from ...text.chat import Chat
from ...text.questions import OpenQuestion
from ...text.roles import Messages
from ...util.console import progress
from ...util.journal import Line, append, digest, open_journal, split_table
from ...util.strict_json import whole_lines
from .endpoint import Endpoint, Request
from .place import Place

TABLE = "answers"
SAMPLES = 50
MAX_NEW_TOKENS = 600

_Place = tuple[str, str, str, int, int]  # set, id, form, paraphrase, sample


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        load: gives the model; called once, and only if an answer is missing.
        key: what its answers depend on, for the header of the table.
        batch_tokens: tokens of one batch, padding and answers included.
    """

    load: Callable[[], Any]
    chat: Chat
    key: dict[str, Any]
    batch_tokens: int = 4096


@dataclass(frozen=True)
class _Draw:
    """One answer to draw."""

    question: OpenQuestion
    sample: int
    seed: int

    @property
    def place(self) -> _Place:
        return (*_name(self.question), self.sample)


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: str
    content: str


@dataclass(frozen=True)
class _Answer(Place):
    """A line of a table of answers."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    answer: str | None
    finished: bool
    error: str | None


def sample_answers(
    source: LocalModel | Endpoint,
    questions: Sequence[OpenQuestion],
    file: str | Path,
    *,
    samples: int | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
) -> list[Line]:
    """Draws answers to each question, and keeps those already in `file`.

    More questions or samples may be requested later; an answer that an endpoint never gave is
    requested again.

    Args:
        file: JSON lines below a header. A line has set, id, form, cluster, paraphrase, sample,
            messages, answer (None with `error`), finished (False: cut off at the token limit) and
            error; also adapted, if a server refused a setting (`without temperature`). Of two lines
            for one answer the later one counts, see `read_answers`.
        samples: answers to each question; None = as its file says, else 50.
        temperature: 0 = greedy; 1 = the model's own distribution, not truncated.
        max_new_tokens: longest answer, in tokens.
        seed: every answer is drawn with its own seed, made from this one and the answer's place.

    Returns:
        The lines of the requested answers, in the order of the questions.

    Raises:
        DataError: two questions have one name, the chat template refuses one, or `file` was made
            with other settings.
        ModelError: the model cannot be loaded, or the endpoint cannot be used.
    """
    draws = [
        _Draw(question, sample, int(digest([seed, *_name(question), sample])[:7], 16))
        for question in _checked(questions, source)
        for sample in range(samples or question.samples or SAMPLES)
    ]
    settings: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    if isinstance(source, LocalModel):
        settings["decoding"] = DECODING
    file = Path(file)
    key = {**source.key, **settings, "seed": seed}
    answers = {_place(line): line for line in open_journal(file, TABLE, key, {}, _Answer)}
    known = {number for number, draw in enumerate(draws) if _is_answered(draw, answers)}
    if len(known) < len(draws):
        if isinstance(source, Endpoint):
            drawn = _draw_remotely(source, draws, known, temperature, max_new_tokens)
        else:
            drawn = _draw_locally(source, draws, known, temperature, max_new_tokens)
        title = f"{file.absolute().parent.name}: {file.stem}"
        with closing(drawn), progress(title, len(draws), len(known)) as advance:
            for lines in drawn:
                append(file, lines)
                answers |= {_place(line): line for line in lines}
                advance(len(lines))
    return [answers[draw.place] for draw in draws]


def read_key(file: Path) -> dict[str, Any]:
    """What the answers of a table depend on, from its header; empty if it has no answers.

    Raises:
        DataError: it is not a table of answers.
    """
    text = file.read_text("utf-8", errors="replace")
    whole = whole_lines(text)
    header, lines = split_table(whole, file, TABLE, _Answer) if whole else ({}, [])
    return dict(header["key"]) if lines else {}


def read_answers(file: str | Path) -> list[Line]:
    """The lines that count in a table of answers.

    Raises:
        DataError: there is no such file, or it is not a table of answers.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError(f"{file}: no such file (expected the answers that `sample_answers` writes)")
    text = file.read_text("utf-8", errors="replace")
    _, lines = split_table(whole_lines(text), file, TABLE, _Answer)
    return list({_place(line): line for line in lines}.values())


def _checked(
    questions: Sequence[OpenQuestion], source: LocalModel | Endpoint
) -> Sequence[OpenQuestion]:
    names = set()
    for question in questions:
        wording = f"{question.form}, paraphrase {question.paraphrase}"
        name = f"question {question.id!r} of set {question.set!r} ({wording})"
        if _name(question) in names:
            raise DataError(f"{name} is given twice")
        names.add(_name(question))
        if isinstance(source, LocalModel):
            try:
                source.chat.encode(question.messages, generation=True)
            except ChatError as error:
                raise DataError(f"{name}: {error}") from error
    return questions


def _name(question: OpenQuestion) -> tuple[str, str, str, int]:
    return question.set, question.id, question.form, question.paraphrase


def _place(line: Line) -> _Place:
    return line["set"], line["id"], line["form"], line["paraphrase"], line["sample"]


def _is_answered(draw: _Draw, answers: dict[_Place, Line]) -> bool:
    """Whether there is an answer to exactly these messages."""
    line = answers.get(draw.place)
    return line is not None and line["error"] is None and line["messages"] == draw.question.messages


def _line(
    draw: _Draw,
    answer: str | None,
    finished: bool,
    error: str | None = None,
    adapted: Sequence[str] = (),
) -> Line:
    question = draw.question
    return {
        "set": question.set,
        "id": question.id,
        "form": question.form,
        "cluster": question.cluster,
        "paraphrase": question.paraphrase,
        "sample": draw.sample,
        "messages": question.messages,
        "answer": answer,
        "finished": finished,
        "error": error,
        **({"adapted": list(adapted)} if adapted else {}),
    }


def _draw_locally(
    model: LocalModel, draws: list[_Draw], known: set[int], temperature: float, max_new_tokens: int
) -> Generator[list[Line], None, None]:
    prompts: list[Messages] = [draw.question.messages for draw in draws]
    seeds = [draw.seed for draw in draws]
    for batch in generate(
        model.load(),
        model.chat,
        prompts,
        max_new_tokens,
        model.batch_tokens,
        temperature,
        seeds,
        known,
    ):
        yield [_line(draws[place], answer.text, answer.finished) for place, answer in batch.items()]


def _draw_remotely(
    endpoint: Endpoint, draws: list[_Draw], known: set[int], temperature: float, max_new_tokens: int
) -> Generator[list[Line], None, None]:
    missing = [draw for number, draw in enumerate(draws) if number not in known]
    requests = [
        Request(draw.question.messages, temperature, max_new_tokens, draw.seed) for draw in missing
    ]
    for place, reply in endpoint.ask(requests):
        yield [_line(missing[place], reply.text, reply.finished, reply.error, reply.adapted)]
