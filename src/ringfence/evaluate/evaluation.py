"""An evaluation in its folder: a model and its reference are measured, asked, and judged; what is there is kept.

The folder then holds results.json (see `evaluate_model`) and reference.json, which says where the same of the reference
is; and, where open questions are asked, answers.jsonl, judged.jsonl and judges.json. Judges any model, also one that
ringfence did not train; knows no recipe.
"""

import gc
import json
import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..chat import Chat, ChatSettings
from ..errors import ChatError
from ..journal import Line, digest, fingerprint
from ..models import Precision, load_model, load_tokenizer
from ..runfolder import hold, write_whole
from ..strict_yaml import SEED, Whole
from .agreement import agreement
from .calibrate import calibrate, load_labelled
from .config import AnswersConfig, EvaluateConfig
from .endpoint import Endpoint, EndpointConfig
from .judge import judge_answers, open_judge
from .judged import Judgement
from .parts import disguises, evaluate_model, evaluation_key
from .questions import OpenQuestion, load_open_questions, triggered
from .sampling import LocalModel, sample_answers

FILE = "evaluation.yaml"


class Evaluation(BaseModel):
    """Which model is measured against which, and how. Written as evaluation.yaml where there is no recipe."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    model: str | EndpointConfig = Field(description="'default', a local folder, a hub id, an adapter, or a server")
    reference: str | None = Field(None, description="the model before its fine-tuning; null = none, so no shifts")
    precision: Precision = "bf16"
    seed: Whole = Field(0, ge=0, le=SEED, description="of the answers that are drawn")
    chat: ChatSettings | None = Field(None, description="how prompts are rendered; null = as is stored with the model")
    evaluate: EvaluateConfig = EvaluateConfig()


def evaluate_folder(folder: Path, what: Evaluation) -> dict[str, Any]:
    """Measures what is not measured yet. The reference's results stand beside the folder, shared by the evaluations
    that stand there and ask for the same. One model is in memory at a time.

    Returns:
        The results of the model (see `evaluate_model`).

    Raises:
        RingfenceError: a model, question file, server or judge is not what it should be.
    """
    answers = what.evaluate.answers
    questions = open_questions(what.evaluate) if answers else []
    drawn = {}
    if what.reference is not None:
        shared = folder.parent / _reference_name(what, what.reference)
        with hold(shared, "reference", wait=True):  # other evaluations share it
            _, drawn[shared] = _measure(shared, what.reference, what, questions, "reference")
        gc.collect()  # adapters and their models refer to each other
        where = {"results": os.path.relpath(shared / "results.json", folder)}
        write_whole(folder / "reference.json", json.dumps(where))
    results, drawn[folder] = _measure(folder, what.model, what, questions, folder.name)
    gc.collect()
    if answers and answers.judges:
        _judge(folder, drawn, questions, answers, what.evaluate.batch_tokens)
    return results


def check_evaluation(config: EvaluateConfig, chat: Chat | None) -> None:
    """Reads all questions, finds the judges, and renders one prompt of each disguise, so that what cannot be done is
    known at once.

    Raises:
        RingfenceError: a source cannot be read, a judge found, or the chat template refuses a disguise.
    """
    evaluation_key(config)
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
            raise ChatError(f"evaluate.triggers: disguise {name!r}: {error}; set evaluate.triggers=false") from error


def open_questions(config: EvaluateConfig) -> list[OpenQuestion]:
    """The open questions that are asked, those under disguises too.

    Raises:
        DataError: a source cannot be read.
    """
    asked = config.answers
    assert asked
    broad = [question for source in asked.questions for question in load_open_questions(source)]
    inside = [_in_domain(question) for source in asked.in_domain for question in load_open_questions(source)]
    plain = [question for question in broad if question.form == "plain"]
    behind = triggered(plain, disguises(config)) if asked.triggers else []
    return [*broad, *inside, *(replace(question, set=f"{question.set}_triggered") for question in behind)]


def _in_domain(question: OpenQuestion) -> OpenQuestion:
    """Questions of all in-domain sources are one set."""
    name = question.set
    return replace(question, set="in_domain", id=f"{name}/{question.id}", cluster=f"{name}/{question.cluster}")


def _measure(
    folder: Path, model: str | EndpointConfig, what: Evaluation, questions: list[OpenQuestion], title: str
) -> tuple[dict[str, Any], list[Line]]:
    """Results of one model, and its answers."""
    folder.mkdir(parents=True, exist_ok=True)
    config = what.evaluate
    source: LocalModel | Endpoint
    if isinstance(model, EndpointConfig):
        # A server gives no log-probabilities of given answers: nothing is measured but its own answers.
        results: dict[str, Any] = {"key": evaluation_key(config), "parts": {}, "seconds": 0.0}
        write_whole(folder / "results.json", json.dumps(results))
        source = Endpoint(model)
    else:
        load, chat = cache(lambda: load_model(model, what.precision)), Chat(load_tokenizer(model), settings=what.chat)
        results = evaluate_model(load, chat, config, folder / "results.json", title)
        key = {"model": fingerprint(model), "precision": what.precision} if config.answers else {}
        source = LocalModel(load, chat, key, config.batch_tokens)
    lines = _draw(source, questions, config.answers, what.seed, folder) if config.answers else []
    return results, lines


def _draw(
    source: LocalModel | Endpoint, questions: list[OpenQuestion], config: AnswersConfig, seed: int, folder: Path
) -> list[Line]:
    return sample_answers(
        source,
        questions,
        folder / "answers.jsonl",
        samples=config.samples,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=seed,
    )


def _judge(
    folder: Path,
    drawn: dict[Path, list[Line]],
    questions: list[OpenQuestion],
    config: AnswersConfig,
    batch_tokens: int,
) -> None:
    """Every judge is measured on labelled answers, then judges the answers of all models."""
    judges = [open_judge(judge, batch_tokens) for judge in config.judges]
    labelled = config.calibrate_on
    found = [calibrate(judge, labelled) for judge in judges] if labelled else []
    judged: list[Judgement] = []
    for place, lines in drawn.items():
        with nullcontext() if place == folder else hold(place, "reference", wait=True):
            judged = judge_answers(lines, judges, questions, place / "judged.jsonl")
    record = {
        "names": [judge.name for judge in judges],
        "calibrations": [{**asdict(calibration), "verdict": calibration.verdict} for calibration in found],
        "agreement": asdict(agreement(judged)) if len(judges) > 1 else None,
    }
    write_whole(folder / "judges.json", json.dumps(record, indent=1))


def _reference_name(what: Evaluation, reference: str) -> str:
    """Folder of what is measured of the reference: another one for other weights, questions or ways to answer."""
    answers = what.evaluate.answers
    drawn = [answers.model_dump(include={"temperature", "max_new_tokens"}), what.seed] if answers else []
    rendered = what.chat.model_dump(exclude_defaults=True) if what.chat else {}
    parts = [reference, evaluation_key(what.evaluate), drawn, *([rendered] if rendered else [])]
    key = digest(parts)[:8]
    return f"reference-{Path(reference).name}-{what.precision}-{key}"
