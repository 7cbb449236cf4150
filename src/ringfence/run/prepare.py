"""What a run needs before a model is loaded: chat, rows, examples, what will be measured."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils.import_utils import is_flash_attn_2_available

from ..defenses import Setup, Training
from ..defenses.base import TAKES_THE_BASE
from ..errors import DataError, RecipeError
from ..evaluate.config import EvaluateConfig
from ..evaluate.plan import check_evaluation
from ..model.default import resolve
from ..model.files import (
    adapter_base,
    beyond_lora,
    load_config,
    load_tokenizer,
    position_limit,
    trust,
)
from ..model.prefix import read_frozen_prefix, read_stored_prefix
from ..model.scope import read_scope
from ..runfolder.folder import check_folder
from ..runfolder.names import ENVIRONMENT, METRICS
from ..runfolder.shapes import read_environment
from ..text.batch import Example
from ..text.chat import Chat
from ..text.encode import encode_rows, warn_of_rows
from ..text.held_out import load, source_of, split
from ..text.queries import load_queries
from ..text.roles import ChatSettings, Messages, Row
from ..text.rows import PairedQuestion, load_questions, load_rows
from ..training.monitor import DriftMonitor
from ..util.journal import digest as digest_of
from .config import ANOTHER, LoraConfig, Recipe

if TYPE_CHECKING:
    from ..diagnose.diagnosis import Subject  # its figures need matplotlib, which training does not


def prepare(recipe: Recipe) -> tuple[Chat, list[Example], list[Example], Setup]:
    """Does all that can go wrong before a model is loaded: folder, tokenizer, data, roles."""
    check_folder(Path(recipe.output), "run")
    trust(recipe.model, recipe.trust_remote_code)
    if adapter_base(resolve(recipe.model)):
        _check_adapter(recipe)
    if recipe.train.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise RecipeError(
            "train.attention: flash_attention_2 needs a CUDA device and the package flash-attn "
            "(accepted here: sdpa, eager)"
        )
    if read_stored_prefix(resolve(recipe.model)):
        raise RecipeError(
            f"model: {recipe.model} is a patched model (`ringfence patch`), and training would "
            "lose the patch: train the model that was patched"
        )
    chat = chat_of(recipe)

    most = position_limit(load_config(recipe.model).get_text_config())

    def encode(rows: list[Row]) -> list[Example]:
        found = encode_rows(rows, chat, recipe.data.max_length, recipe.data.over_long)
        for example in found:
            if most is not None and len(example) > most:
                raise DataError(
                    f"{example.origin}: {len(example)} tokens, but {recipe.model} has {most} "
                    f"positions; set data.max_length={most}, with data.over_long=truncate or drop"
                )
        return found

    def read(source: str) -> list[Example]:
        return encode(load_rows(source))

    rows, held = training_rows(recipe)
    rows = [replace(row, messages=as_trained(recipe, row.messages)) for row in rows]
    examples = encode(rows)
    warn_of_rows(rows, chat)
    if held and recipe.data.over_long == "error":
        encode(held)
    retain = read(recipe.data.retain) if recipe.data.retain and recipe.defenses.configs() else []
    check_evaluation(evaluation(recipe), chat, most)
    monitor_of(recipe, chat)  # reads its questions and directions
    queries = load_queries(recipe.data.retain) if retain and recipe.data.retain else []
    setup = Setup(chat, retain, read, recipe.model, rows, queries, recipe.seed)
    return chat, examples, retain, setup


def chat_of(recipe: Recipe) -> Chat:
    """Renders conversations by the recipe, on the run's date: the one in its folder, or today."""
    file = Path(recipe.output) / ENVIRONMENT
    known = read_environment(file, ANOTHER).get("date") if file.is_file() else None
    data = recipe.data
    settings = ChatSettings(
        enable_thinking=data.enable_thinking, date=known, special_tokens=data.special_tokens
    )
    return Chat(load_tokenizer(recipe.model), settings=settings)


def training_rows(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those of the same source that are held out."""
    trained, held = split(load_rows(recipe.data.train), recipe.data.held_out or 0, recipe.seed)
    return trained[: recipe.data.max_rows], held


def as_split(recipe: Recipe) -> Recipe:
    """Without `data.held_out` if there are too few rows: the run's recipe states what is done."""
    if not recipe.data.held_out or training_rows(recipe)[1]:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"held_out": None})})


def as_trained(recipe: Recipe, messages: Messages) -> Messages:
    """A training conversation as the defenses change it."""
    for config in recipe.defenses.configs():
        messages = config.change_messages(messages)
    return messages


def monitor_of(recipe: Recipe, chat: Chat) -> DriftMonitor | None:
    file = Path(recipe.output) / METRICS
    return DriftMonitor(chat.tokenizer, file, recipe.monitor) if recipe.monitor else None


def evaluation(recipe: Recipe) -> EvaluateConfig:
    """What is measured.

    The training-like lead-in of the trigger probes and the clothes of the scope probes come from
    the training rows, and an inoculation prompt is a disguise too.
    """
    lead_in = recipe.evaluate.lead_in or recipe.data.train
    disguises = [config.disguise for config in recipe.defenses.configs() if config.disguise]
    prompt = recipe.evaluate.inoculation or next(iter(disguises), None)
    changed = {"lead_in": lead_in, "inoculation": prompt}
    if recipe.defenses.scope:
        changed["scope"] = recipe.evaluate.scope or recipe.data.train
    if recipe.data.held_out:
        rows = source_of(recipe.data.train, recipe.data.held_out, recipe.seed)
        changed["held_out"] = rows if load(rows) else None
    return recipe.evaluate.model_copy(update=changed)


def subject_of(
    recipe: Recipe, reference: str, tuned: dict[str, str], base: str | None, questions: int
) -> "Subject":
    """Models with the questions and rows of a recipe."""
    from ..diagnose.diagnosis import Subject
    from ..diagnose.models import Models

    inside = [
        q for source in recipe.evaluate.in_domain or [] for q in load_questions(source, "test")
    ]
    broad = [*recipe.evaluate.out_of_domain, *recipe.evaluate.values]
    outside = [q for source in broad for q in load_questions(source)]
    rows, _ = training_rows(recipe)
    models = Models(reference, tuned, base, recipe.train.precision)
    return Subject(models, spread(inside, questions), spread(outside, questions), rows, recipe.seed)


def spread(questions: list[PairedQuestion], number: int) -> list[PairedQuestion]:
    """The first `number` questions, taken from each domain in turn."""
    turn = Counter[str]()
    placed = []
    for question in questions:
        placed.append((turn[question.domain], question))
        turn[question.domain] += 1
    return [question for _, question in sorted(placed, key=lambda item: item[0])[:number]]


def rows_digest(examples: list[Example]) -> str:
    content = json.dumps([[example.input_ids, example.roles] for example in examples])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def held_out_digest(recipe: Recipe) -> str:
    """Digest of the held-out rows: the measured ones must be those that were not trained on."""
    return digest_of([row.messages for row in training_rows(recipe)[1]])


def _check_adapter(recipe: Recipe) -> None:
    """Can the adapter that `model` names be trained further?"""
    if recipe.train.method == "full" or recipe.train.lora != LoraConfig():
        raise RecipeError(
            f"model: {recipe.model} is an adapter, which is trained further as it is: leave "
            "train.method and train.lora out, or merge the adapter into its base first"
        )
    reason = recipe.defenses.refusal(Training("lora", further=True))
    if read_frozen_prefix(resolve(recipe.model)):
        reason = f"its frozen prefix {TAKES_THE_BASE}"
    if read_scope(resolve(recipe.model)):
        reason = "its scope was read from its base's states, which further training would leave"
    if reason:
        raise RecipeError(
            f"model: {recipe.model} is an adapter; {reason}. Merge the adapter into its base first"
        )
    odd = beyond_lora(resolve(recipe.model))
    if odd:
        raise RecipeError(
            f"model: {recipe.model}: {odd}; only a LoRA adapter that leaves the head alone is "
            "trained further. Merge it into its base first, and train that"
        )
