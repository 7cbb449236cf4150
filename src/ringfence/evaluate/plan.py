"""What an evaluation will ask, checked before anything is loaded, and how much work it is."""

from dataclasses import replace

from ..errors import ChatError, ModelError
from ..text.chat import Chat
from ..text.questions import OpenQuestion, load_open_questions, triggered
from .answers.judge import open_judge
from .answers.labelled import load_labelled
from .answers.sampling import SAMPLES
from .config import EvaluateConfig
from .measures.pairs import disguises
from .parts import Work, check_lengths, evaluation_key, too_long
from .parts import work as measured


def check_evaluation(
    config: EvaluateConfig, chat: Chat | None, positions: int | None = None
) -> None:
    """Reads all questions, finds the judges, and renders one prompt of each disguise, so that
    mistakes show at once.

    Raises:
        RingfenceError: a source cannot be read, a judge is not found, the chat template refuses a
            disguise, or a text and its answer have more tokens than the model has `positions` (None
            = no limit).
    """
    evaluation_key(config)
    if chat is not None and positions is not None:
        check_lengths(config, chat, positions)
        for question in open_questions(config) if config.answers else []:
            assert config.answers
            prompt = chat.encode(question.messages, generation=True).input_ids
            size = len(prompt) + config.answers.max_new_tokens
            if size > positions:
                name = f"question {question.set}/{question.id}"
                raise ModelError(too_long(name, size, positions))
    if config.answers:
        open_questions(config)
        for judge in config.answers.judges:
            open_judge(judge)
        if config.answers.judges and config.answers.calibrate_on:
            load_labelled(config.answers.calibrate_on)
    if chat is None or not config.triggers:
        return
    for name, before in disguises(config).items():
        try:
            chat.encode([*before, {"role": "user", "content": "Hello"}], generation=True)
        except ChatError as error:
            raise ChatError(
                f"evaluate.triggers: disguise {name!r}: {error}; set evaluate.triggers=false"
            ) from error


def open_questions(config: EvaluateConfig) -> list[OpenQuestion]:
    """The open questions that are asked, including those under disguises.

    Raises:
        DataError: a source cannot be read.
    """
    asked = config.answers
    assert asked
    broad = [question for source in asked.questions for question in load_open_questions(source)]
    inside = [
        _in_domain(question)
        for source in asked.in_domain
        for question in load_open_questions(source)
    ]
    plain = [question for question in broad if question.form == "plain"]
    behind = triggered(plain, disguises(config)) if asked.triggers else []
    return [
        *broad,
        *inside,
        *(replace(question, set=f"{question.set}_triggered") for question in behind),
    ]


def work(config: EvaluateConfig, chat: Chat) -> Work:
    """What measuring one model takes, including its answers to open questions."""
    found = measured(config, chat)
    asked = config.answers
    if asked is None:
        return found
    answers = sum(
        asked.samples or question.samples or SAMPLES for question in open_questions(config)
    )
    return replace(
        found,
        written=found.written + answers,
        written_tokens=found.written_tokens + answers * asked.max_new_tokens,
    )


def _in_domain(question: OpenQuestion) -> OpenQuestion:
    """Questions of all in-domain sources are one set."""
    name = question.set
    return replace(
        question, set="in_domain", id=f"{name}/{question.id}", cluster=f"{name}/{question.cluster}"
    )
