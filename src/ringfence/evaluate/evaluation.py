"""An evaluation in its folder: a model and its reference are measured, asked and judged; results
that are there already are kept.

The folder then holds results.json (see `evaluate_model`) and, where open questions are asked,
answers.jsonl, judged.jsonl and judges.json; and in reference/ the same of the reference, which
reference.json points to. Everything is keyed by content: nothing is kept of another model, or of
one asked otherwise. Measures any model, including one that ringfence did not train; knows no
recipe.
"""

import gc
import json
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..errors import DataError
from ..model.files import load_tokenizer
from ..model.fingerprint import fingerprint
from ..model.loading import load_model
from ..model.precision import Precision, settled
from ..runfolder.folder import hold
from ..runfolder.names import ANSWERS, JUDGED, JUDGES, REFERENCE, REFERENCE_FILE, RESULTS
from ..text.chat import Chat
from ..text.questions import OpenQuestion
from ..text.roles import ChatSettings
from ..util.files import write_whole
from ..util.journal import Line, digest
from ..util.strict_yaml import SEED, Whole
from .answers.agreement import agreement
from .answers.calibrate import calibrate
from .answers.config import AnswersConfig
from .answers.endpoint import Endpoint, EndpointConfig
from .answers.judge import judge_answers, open_judge
from .answers.judged import Judgement
from .answers.sampling import LocalModel, read_key, sample_answers
from .config import EvaluateConfig
from .parts import evaluate_model, evaluation_key
from .plan import open_questions

_OF_A_MODEL = (RESULTS, ANSWERS, JUDGED)


class Evaluation(BaseModel):
    """Which model is measured against which, and how. Written as evaluation.yaml if there is no
    recipe."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    model: str | EndpointConfig = Field(
        description="'default', a local folder, a hub id, an adapter, or a server"
    )
    reference: str | None = Field(
        None, description="the model before its fine-tuning; null = none, so no shifts"
    )
    precision: Precision = Field("auto", validate_default=True, description="of the weights")
    trust_remote_code: bool = Field(
        False, description="run the code that comes with the model and its reference"
    )
    seed: Whole = Field(0, ge=0, le=SEED, description="of the sampled answers")
    chat: ChatSettings | None = Field(
        None, description="how prompts are rendered; null = as stored with the model"
    )
    evaluate: EvaluateConfig = EvaluateConfig()

    _settled = field_validator("precision")(settled)


def evaluate_folder(folder: Path, what: Evaluation) -> dict[str, Any]:
    """Measures what is not measured yet. The reference's results are also kept next to the folder,
    where other evaluations that ask for the same find them, and copied into it. One model is in
    memory at a time.

    Returns:
        The results of the model (see `evaluate_model`).

    Raises:
        RingfenceError: a model, question file, server or judge cannot be used.
    """
    answers = what.evaluate.answers
    questions = open_questions(what.evaluate) if answers else []
    _check_answers(folder, what)
    drawn = {}
    shared: Path | None = None
    if what.reference is not None:
        shared = folder.parent / _reference_name(what, what.reference)
        with hold(shared, "reference", wait=True):  # other evaluations share it
            _, drawn[shared] = _measure(shared, what.reference, what, questions, "reference")
        gc.collect()  # adapters and their models refer to each other
        _keep(shared, folder)
    results, drawn[folder] = _measure(folder, what.model, what, questions, folder.name)
    gc.collect()
    if answers and answers.judges:
        _judge(folder, drawn, questions, answers, what.evaluate.batch_tokens)
        if shared is not None:
            _keep(shared, folder)
    return results


def _keep(shared: Path, folder: Path) -> None:
    """Copies the reference's results into a folder, which then needs no other."""
    for name in _OF_A_MODEL:
        inside = folder / REFERENCE / name
        if (shared / name).is_file():
            write_whole(inside, (shared / name).read_text("utf-8"))
        else:
            inside.unlink(missing_ok=True)
    write_whole(folder / REFERENCE_FILE, json.dumps({"results": f"{REFERENCE}/results.json"}))


def _model_key(model: str, what: Evaluation) -> dict[str, Any]:
    """What a model's results depend on besides the questions."""
    return {
        "model": fingerprint(model),
        "precision": what.precision,
        **({"chat": r[0]} if (r := _rendered(what)) else {}),
    }


def _rendered(what: Evaluation) -> list[Any]:
    """How conversations are rendered, if not by default."""
    settings = what.chat.model_dump(exclude_defaults=True) if what.chat else {}
    return [settings] if settings else []


def _check_answers(folder: Path, what: Evaluation) -> None:
    """Answers and judgements of another model must not be left next to new numbers, nor deleted:
    they may have cost a lot.

    Raises:
        DataError: the folder holds some.
    """
    file = folder / ANSWERS
    if isinstance(what.model, EndpointConfig) or not file.is_file():
        return
    key, there = _model_key(what.model, what), read_key(file)
    if any(there.get(name, here) != here for name, here in key.items()):
        raise DataError(
            f"{file}: holds answers of another model than {what.model} is now (other weights, "
            "tokenizer or precision); choose another output, or delete it, and judged.jsonl with it"
        )


def _measure(
    folder: Path,
    model: str | EndpointConfig,
    what: Evaluation,
    questions: list[OpenQuestion],
    title: str,
) -> tuple[dict[str, Any], list[Line]]:
    """Results of one model, and its answers."""
    folder.mkdir(parents=True, exist_ok=True)
    config = what.evaluate
    source: LocalModel | Endpoint
    if isinstance(model, EndpointConfig):
        # A server gives no log-probabilities of given answers: only its own answers are measured.
        results: dict[str, Any] = {"key": evaluation_key(config), "parts": {}, "seconds": 0.0}
        write_whole(folder / RESULTS, json.dumps(results))
        source = Endpoint(model)
    else:
        load = cache(lambda: load_model(model, what.precision))
        chat = Chat(load_tokenizer(model), settings=what.chat)
        key = _model_key(model, what)
        results = evaluate_model(load, chat, config, folder / RESULTS, title, key)
        source = LocalModel(load, chat, key, config.batch_tokens)
    lines = _draw(source, questions, config.answers, what.seed, folder) if config.answers else []
    return results, lines


def _draw(
    source: LocalModel | Endpoint,
    questions: list[OpenQuestion],
    config: AnswersConfig,
    seed: int,
    folder: Path,
) -> list[Line]:
    return sample_answers(
        source,
        questions,
        folder / ANSWERS,
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
            judged = judge_answers(lines, judges, questions, place / JUDGED)
    record = {
        "names": [judge.name for judge in judges],
        "calibrations": [
            {**asdict(calibration), "verdict": calibration.verdict} for calibration in found
        ],
        "agreement": asdict(agreement(judged)) if len(judges) > 1 else None,
    }
    write_whole(folder / JUDGES, json.dumps(record, indent=1))


def _reference_name(what: Evaluation, reference: str) -> str:
    """Name of the reference's folder: another for other weights, questions or ways to answer."""
    answers = what.evaluate.answers
    drawn: list[Any] = []
    if answers:
        drawn = [answers.model_dump(include={"temperature", "max_new_tokens"}), what.seed]
    key = digest([fingerprint(reference), evaluation_key(what.evaluate), drawn, *_rendered(what)])
    return f"reference-{Path(reference).name}-{what.precision}-{key[:8]}"
