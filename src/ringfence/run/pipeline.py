"""A run, from recipe to results, in one folder. Each stage reads the folder, does what is missing, and writes there:
recipe.yaml, environment.json, metrics.jsonl, training.json, adapter/ (or model/), and the files of an evaluation.
"""

import gc
import hashlib
import json
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from ..defenses import Defense, DefenseConfig, Defenses, Setup
from ..errors import DataError, RecipeError, RingfenceError
from ..evaluate.config import EvaluateConfig
from ..evaluate.evaluation import FILE as EVALUATION
from ..evaluate.evaluation import Evaluation, check_evaluation, evaluate_folder
from ..model.default import resolve
from ..model.files import (
    adapter_base,
    beyond_lora,
    empty_model,
    load_config,
    load_tokenizer,
    pad_id,
    position_limit,
    trust,
)
from ..model.fingerprint import fingerprint
from ..model.loading import load_model, with_adapter
from ..model.precision import settled
from ..model.prefix import read_frozen_prefix, read_stored_prefix
from ..model.sharding import count, is_sharded, whole_state
from ..model.taps import decoder_layers
from ..processes import is_main, world
from ..report.summary import Row as ReportRow
from ..report.summary import read_run, summarise
from ..runfolder.folder import (
    check_checkpoints,
    check_folder,
    drop_checkpoints,
    hold,
    last_checkpoint,
    told_if_full,
    write_whole,
)
from ..runfolder.shapes import read_carriers, read_environment, read_metrics, read_recipe, read_results, read_training
from ..text import opswap
from ..text.batch import Example
from ..text.chat import Chat, ChatSettings, Messages
from ..text.data import PairedQuestion, Row, encode_rows, load_questions, load_rows, warn, warn_of_rows
from ..text.held_out import load, source_of, split
from ..training.monitor import REFERENCE_FILE as START
from ..training.monitor import DriftMonitor
from ..training.ranks import (
    deepspeed_stage,
    device_settings,
    fsdp,
    join,
    largest,
    leave,
    main_first,
    sharding,
    shards,
    wait,
)
from ..training.reference import ADAPTER as REFERENCE_ADAPTER
from ..training.reference_cache import ReferenceCache, wanted
from ..training.stream import TrainStream
from ..util.console import console, progress
from ..util.journal import digest as digest_of
from ..util.machine import environment, estimated, peak_memory, reset_peak_memory
from ..util.quiet import quiet_libraries
from ..util.strict_yaml import dump, set_value, validate
from ..util.words import counted
from .config import LoraConfig, Recipe, dump_recipe, parse_recipe, recipe_tree, stored_recipe

if TYPE_CHECKING:
    from ..diagnose.diagnosis import Subject  # its figures need matplotlib, which training does not
    from ..training.trainer import DefendedTrainer


CARRIERS = "carriers.json"
PILOT_ROWS, PILOT_QUESTIONS = 200, 24  # of `treft.tokens: auto`
_ANOTHER = "delete the folder, or name another output"
AGAIN = 2.0  # seconds between a first and a second signal


class Interrupted(RingfenceError):
    """The user stopped a run; the same command goes on where it stopped."""


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def recipe(self) -> Recipe:
        return stored_recipe(self.folder / "recipe.yaml")

    @property
    def trained(self) -> bool:
        file = self.folder / "training.json"
        return file.is_file() and bool(read_training(file))

    @property
    def weights(self) -> Path:
        """What was trained: the folder of the adapter, or of the whole model."""
        return self.folder / ("adapter" if self.recipe.train.method == "lora" else "model")

    def results(self) -> dict[str, Any]:
        """The measurements of the tuned model (see `evaluate_model`)."""
        return read_results(self.folder / "results.json")

    def summary(self, control: "Run | None" = None) -> ReportRow:
        """Shifts against the reference with their intervals, fluency and cost: the row of this run in the report.

        With `control`, a run trained on sound answers, effects too.
        """
        return summarise(read_run(self.folder), read_run(control.folder) if control else None)


@quiet_libraries()
def fine_tune(
    train: str,
    *,
    defenses: Sequence[DefenseConfig] = (),
    model: str = "default",
    output: str = "runs/run",
    retain: str | None = "shipped:retain",
    seed: int = 0,
    evaluate: bool | dict[str, Any] | EvaluateConfig = True,
    **options: Any,
) -> Run:
    """Fine-tunes a model with defenses and measures it.

    Args:
        train: source of the rows: a local file, a hub id, `shipped:NAME`.
        defenses: any set, e.g. `[KL(weight=0.3), Interleave(ratio=0.1)]`.
        retain: source of safe rows for defenses that need some.
        evaluate: what is measured: fields of `evaluate` in the recipe, as a dict or an `EvaluateConfig`; True = the
            defaults; False leaves the measurements out (`ringfence evaluate` makes them later).
        options: fields of `train` in the recipe, e.g. `epochs=2, learning_rate=3e-4`.

    Raises:
        RingfenceError: whatever is wrong with the input, before training starts.
    """
    measured = evaluate.model_dump(exclude_unset=True) if isinstance(evaluate, EvaluateConfig) else evaluate
    recipe = parse_recipe(
        {
            "model": model,
            "output": output,
            "seed": seed,
            "data": {"train": train, "retain": retain},
            "train": options,
            "defenses": Defenses.of(list(defenses)).model_dump(exclude_none=True),
            "evaluate": {} if isinstance(measured, bool) else measured,
        }
    )
    return train_run(recipe) if evaluate is False else run_recipe(recipe)


@quiet_libraries()
def run_recipe(recipe: Recipe) -> Run:
    """Trains, measures, and does the same for the benign twin if the recipe asks for one.

    Of several ranks the main process alone measures, when all has been trained.
    """
    join()
    with ExitStack() as held:
        with main_first():
            held.enter_context(hold(Path(recipe.output), "run"))
            if recipe.evaluate.benign:
                prepare(benign_twin(recipe))
        run = train_run(recipe)
        trained = [run, train_run(benign_twin(recipe))] if recipe.evaluate.benign else [run]
        leave()
        if is_main():
            for each in trained:
                evaluate_run(each)
    return run


def benign_twin(recipe: Recipe) -> Recipe:
    """The same training with the same defenses on a harmless task: is it still learnt? (criterion 3)"""
    assert recipe.evaluate.benign is not None
    task = opswap.options(recipe.evaluate.benign.removeprefix("opswap:"))
    found = (Path(recipe.output) / CARRIERS).is_file()  # the twin has no pilot of its own
    tree = recipe_tree(_with_carriers(recipe) if found else recipe)
    tree["output"] = f"{recipe.output}-benign"
    tree["data"]["train"] = recipe.evaluate.benign
    tree["data"] |= {"max_rows": None, "held_out": None}
    tree["train"]["epochs"] = recipe.evaluate.benign_epochs
    tree["evaluate"] = {
        "in_domain": [],
        "out_of_domain": [],
        "values": [],
        "triggers": False,
        "fluency": None,
        "samples": 0,
        "opswap_tiers": [task["tier"]],
        "opswap_permuted": bool(task["permuted"]),
        "opswap_largest": task["largest"],
        "opswap_items": recipe.evaluate.opswap_items,
    }
    return parse_recipe(tree)


# ------------------------------------------------------------------ training


def prepare(recipe: Recipe) -> tuple[Chat, list[Example], list[Example], Setup]:
    """Everything that can go wrong before a model is loaded: folder, tokenizer, data, roles."""
    check_folder(Path(recipe.output), "run")
    trust(recipe.model, recipe.trust_remote_code)
    if adapter_base(resolve(recipe.model)):
        _check_adapter(recipe)
    if recipe.train.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise RecipeError(
            "train.attention: flash_attention_2 needs a CUDA device and the package flash-attn (accepted here: sdpa, "
            "eager)"
        )
    if read_stored_prefix(resolve(recipe.model)):
        raise RecipeError(
            f"model: {recipe.model} is a patched model (`ringfence patch`); what is trained on would lose the patch: "
            "train the model that was patched"
        )
    chat = chat_of(recipe)

    most = position_limit(load_config(recipe.model).get_text_config())

    def encode(rows: list[Row]) -> list[Example]:
        found = encode_rows(rows, chat, recipe.data.max_length, recipe.data.over_long)
        for example in found:
            if most is not None and len(example) > most:
                raise DataError(
                    f"{example.origin}: {len(example)} tokens, but {recipe.model} has {most} positions; set "
                    f"data.max_length={most}, with data.over_long=truncate or drop"
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
    _monitor(recipe, chat)  # reads its questions and directions
    return chat, examples, retain, Setup(chat, retain, read, recipe.model)


def chat_of(recipe: Recipe) -> Chat:
    """Renders conversations as the recipe says, on the date of the run: the one in its folder, or today."""
    file = Path(recipe.output) / "environment.json"
    known = read_environment(file, _ANOTHER).get("date") if file.is_file() else None
    data = recipe.data
    settings = ChatSettings(enable_thinking=data.enable_thinking, date=known, special_tokens=data.special_tokens)
    return Chat(load_tokenizer(recipe.model), settings=settings)


def training_rows(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """The rows that are trained on, and those of the same source that are held out."""
    trained, held = split(load_rows(recipe.data.train), recipe.data.held_out or 0, recipe.seed)
    return trained[: recipe.data.max_rows], held


def as_split(recipe: Recipe) -> Recipe:
    """Without `data.held_out` where the file is too small to spare rows: so the run folder says what was done."""
    if not recipe.data.held_out or training_rows(recipe)[1]:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"held_out": None})})


def as_trained(recipe: Recipe, messages: Messages) -> Messages:
    """A training conversation as the defenses change it."""
    for config in recipe.defenses.configs():
        messages = config.change_messages(messages)
    return messages


@quiet_libraries()
def train_run(recipe: Recipe) -> Run:
    """Trains after a recipe, or goes on with the run in its folder. Does nothing when it is trained already.

    Started by `accelerate launch` or `torchrun`, all ranks train together, and the main process writes the folder.

    Raises:
        RecipeError: the folder holds a run of another recipe.
        Interrupted: the user pressed Ctrl-C; a checkpoint is kept.
    """
    join()
    _check_ranks(recipe)
    with ExitStack() as held:
        with main_first():
            held.enter_context(hold(Path(recipe.output), "run"))
        return _train_run(Run(Path(recipe.output)), recipe)


def _train_run(run: Run, recipe: Recipe) -> Run:
    with main_first():
        recipe = as_split(recipe)
        check_same_recipe(run, recipe)
        chat, examples, retain, setup = prepare(recipe)
        digest = _digest(examples + retain)
        weights = fingerprint(recipe.model)
        _check_rows(run, digest)
        _check_weights(run, recipe, weights)
        trained = run.trained
    if trained:
        if is_main():
            write_whole(run.folder / "recipe.yaml", dump_recipe(recipe))  # what is measured may change
            _clear(run.folder / "checkpoints")  # a run may have been killed before it could
        return run
    defenses = _with_carriers(recipe).defenses.build(setup)
    stream = build_stream(recipe, examples, retain, defenses)
    if recipe.train.reference_cache != "none":
        wanted(stream, 1)  # what cannot be cached is refused before a model is loaded
    torch.manual_seed(recipe.seed)
    model = trainable_model(recipe)
    if is_main():
        write_whole(run.folder / "recipe.yaml", dump_recipe(recipe))
        how = {"ranks": world(), "sharding": sharding()}
        rows_there = {
            "rows": digest,
            "held_out": _held_out_digest(recipe),
            "date": chat.settings.date,
            "model": weights,
        }
        about = {**environment(recipe.seed), **rows_there, **how}
        write_whole(run.folder / "environment.json", json.dumps(about, indent=1))
    trainer = build_trainer(recipe, model, stream, pad_id(chat.tokenizer))
    monitor = _monitor(recipe, chat)
    if monitor:
        trainer.add_callback(monitor)
    trainer.fill_cache()
    _train(trainer, run, recipe)
    for defense in defenses:
        defense.finish(trainer.accelerator.unwrap_model(trainer.model))
    with told_if_full(run.folder):
        _save_weights(trainer, run)
        if is_main():
            chat.save(run.weights)
            for defense in defenses:
                defense.save(run.weights)
    if is_main():
        _record_training(run, recipe, trainer, examples, monitor)
        _clear(run.folder / "checkpoints")
    wait()
    del trainer, model
    gc.collect()  # a trainer and its model refer to each other; the next run in this process needs the memory
    return run


def _clear(checkpoints: Path) -> None:
    """After training nothing is left of the checkpoints, nor of what the monitor kept for a resumed run."""
    drop_checkpoints(checkpoints)
    (checkpoints / START).unlink(missing_ok=True)
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()


def reference_cache(recipe: Recipe) -> ReferenceCache | None:
    """Keyed by everything except the rows that determines the reference's states."""
    train = recipe.train
    if train.reference_cache == "none":
        return None
    source = resolve(recipe.model)
    base = adapter_base(source)
    reference = {
        "model": fingerprint(base or source),
        "adapter": fingerprint(source) if base else None,
        "weights": "fp32" if train.method == "full" else train.precision,
        "precision": train.precision,
        "attention": train.attention or empty_model(recipe.model).config._attn_implementation,
    }
    return ReferenceCache(train.reference_cache, reference, train.top_k)


def position_bytes(recipe: Recipe) -> int:
    """What one position takes in the reference's cache: a final hidden state in the type of the weights, or the ids (4
    bytes) and log-probabilities (4 bytes) of tokens."""
    train = recipe.train
    if train.reference_cache == "top_k":
        return 8 * train.top_k
    byte = 4 if train.method == "full" or train.precision == "fp32" else 2
    return byte * int(load_config(recipe.model).get_text_config().hidden_size)


def _save_weights(trainer: Any, run: Run) -> None:
    """Adapter or whole model, as one process would save it, wherever its pieces lie."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_adapter = hasattr(model, "peft_config")
    options: dict[str, Any] = {"selected_adapters": ["default"]} if is_adapter else {}
    if is_sharded(model):
        options["state_dict"] = whole_state(model, trained_only=is_adapter)
    if is_main():
        model.save_pretrained(run.weights, **options)


def _with_carriers(recipe: Recipe) -> Recipe:
    """With the roles in the place of `treft.tokens: auto` that carry the shift of an undefended pilot: a short run on
    the first rows, in RUN/pilot. The choice and what speaks for it are kept in RUN/carriers.json."""
    treft = recipe.defenses.treft
    if treft is None or not treft.is_auto:
        return recipe
    rows = min(PILOT_ROWS, recipe.data.max_rows or PILOT_ROWS)
    train = recipe.train.model_copy(update={"reference_cache": "none"})
    plain = {"output": f"{recipe.output}/pilot", "defenses": Defenses(), "monitor": None, "train": train}
    pilot = recipe.model_copy(update={**plain, "data": recipe.data.model_copy(update={"max_rows": rows})})
    weights = str(train_run(pilot).weights)
    file = Path(recipe.output) / CARRIERS
    made_of = {"model": fingerprint(recipe.model), "pilot": fingerprint(weights)}
    known = read_carriers(file) if file.is_file() else {}
    if is_main() and any(known.get(name) != value for name, value in made_of.items()):
        from ..diagnose.carriers import best_role, measure

        subject = _subject(pilot, recipe.model, {"pilot": weights}, None, PILOT_QUESTIONS)
        choice = best_role(measure(subject, by_layer=False)["tuned"]["pilot"])
        console.print(f"treft.tokens: auto: {choice.sentence}", highlight=False, soft_wrap=True)
        write_whole(file, json.dumps({"rows": rows, **made_of, **asdict(choice)}, indent=1))
    wait()
    held = validate(type(treft), {**treft.model_dump(), "tokens": read_carriers(file)["role"]}, str(file))
    return recipe.model_copy(update={"defenses": recipe.defenses.model_copy(update={"treft": held})})


def _check_ranks(recipe: Recipe) -> None:
    """What cannot be done with sharded weights."""
    how = sharding()
    if shards() and recipe.train.precision == "nf4":
        raise RecipeError(f"train.precision: nf4: weights in 4 bits cannot be sharded ({how}); accepted: bf16, fp32")
    if shards() and recipe.train.compile:
        raise RecipeError(f"train.compile: not with sharded weights ({how}); set it to false")
    if shards() and recipe.train.method == "full" and recipe.monitor:
        raise RecipeError(f"monitor: with train.method: full it copies the head, which cannot be sharded ({how})")
    if device_settings()["backend"] and recipe.train.precision != "fp32":
        raise RecipeError(f"train.precision: {recipe.train.precision}: DeepSpeed on CPUs computes in fp32 alone")
    safelora, lock = recipe.defenses.safelora, recipe.defenses.subspace_lock
    if deepspeed_stage() == 3 and safelora and recipe.train.method == "full":
        raise RecipeError(f"defenses.safelora: with train.method: full it would need all weights whole at once ({how})")
    if deepspeed_stage() is not None and (lock or (safelora and safelora.interval)):
        name = "subspace_lock" if lock else "safelora.interval"
        raise RecipeError(f"defenses.{name}: DeepSpeed would undo it after each step; accepted: DDP, FSDP2")


def check_same_recipe(run: Run, recipe: Recipe) -> None:
    """Whether a run of this recipe can go on here.

    Raises:
        RingfenceError: the folder holds a run of another recipe, or checkpoints of somebody else's.
    """
    check_checkpoints(run.folder / "checkpoints")
    if (run.folder / "recipe.yaml").is_file():
        fields = {"model", "data", "train", "defenses", "monitor", "seed"}
        there, here = (each.model_dump(mode="json", include=fields) for each in (run.recipe, recipe))
        if there != here:
            raise RecipeError(
                f"{run.folder} holds a run of another recipe ({'; '.join(_differences(there, here))}); choose another "
                "output, or delete the folder"
            )


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Fields in which two trees differ: `train.epochs: 1.0 there, 4.0 here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
    elif there != here:
        yield f"{name}: {there!r} there, {here!r} here"


def _monitor(recipe: Recipe, chat: Chat) -> DriftMonitor | None:
    file = Path(recipe.output) / "metrics.jsonl"
    return DriftMonitor(chat.tokenizer, file, recipe.monitor) if recipe.monitor else None


def _check_rows(run: Run, digest: str) -> None:
    file = run.folder / "environment.json"
    there = read_environment(file, _ANOTHER) if file.is_file() else {"rows": digest, "ranks": world()}
    if there.get("rows") != digest:
        raise RecipeError(f"{run.folder}: the rows have changed since; choose another output, or delete the folder")
    if not run.trained and there.get("ranks", 1) != world():
        raise RecipeError(
            f"{run.folder}: begun by {there.get('ranks', 1)} processes, found {world()}; a step would have other rows: "
            "start as many, or choose another output"
        )


def _check_weights(run: Run, recipe: Recipe, weights: str) -> None:
    """What was trained, or is half trained, must be based on the weights that the model has now."""
    file = run.folder / "environment.json"
    there = read_environment(file, _ANOTHER) if file.is_file() else {}
    if there.get("model", weights) != weights:
        raise RecipeError(
            f"{run.folder}: the files of model {recipe.model} have changed since this run was started; choose another "
            "output, or delete the folder"
        )


def _digest(examples: list[Example]) -> str:
    content = json.dumps([[example.input_ids, example.roles] for example in examples])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _held_out_digest(recipe: Recipe) -> str:
    """Of the rows that are held out: measured ones must be those that were not trained on."""
    return digest_of([row.messages for row in training_rows(recipe)[1]])


def _check_adapter(recipe: Recipe) -> None:
    """Can the adapter that `model` names be trained further?"""
    if recipe.train.method == "full" or recipe.train.lora != LoraConfig():
        raise RecipeError(
            f"model: {recipe.model} is an adapter, which is trained further as it is: leave train.method and "
            "train.lora out, or merge the adapter into its base first"
        )
    of_base = [name for name in ("frozen_prefix", "safelora", "subspace_lock") if getattr(recipe.defenses, name)]
    if of_base or read_frozen_prefix(resolve(recipe.model)):
        raise RecipeError(
            f"model: {recipe.model} is an adapter; {', '.join(of_base) or 'its frozen prefix'} would take its base for "
            "the reference. Merge the adapter into its base first"
        )
    odd = beyond_lora(resolve(recipe.model))
    if odd:
        raise RecipeError(
            f"model: {recipe.model}: {odd}; only a LoRA adapter that leaves the head alone is trained further. "
            "Merge it into its base first, and train that"
        )


def build_stream(
    recipe: Recipe, examples: list[Example], retain: list[Example], defenses: list[Defense]
) -> TrainStream:
    """Rows in the order of training, with all that defenses add."""
    step_rows = recipe.train.batch_size * recipe.train.accumulation * world()
    return TrainStream(examples, retain, defenses, step_rows, recipe.seed)


def computed_tokens(recipe: Recipe, stream: TrainStream) -> float:
    """What all epochs compute, in tokens of a plain LoRA step (4 operations a weight: forward, and backward through
    frozen weights): a trained weight needs 2 more, checkpointing 2 more, a token of the reference 2."""
    train, defenses = recipe.train, recipe.defenses
    rows, riders = sum(map(len, stream.rows)), sum(len(rider) for of_row in stream.riders for rider in of_row)
    passes = (6 if train.method == "full" else 4) + (2 if train.gradient_checkpointing else 0)
    asked = [penalty.every for penalty in (defenses.kl, defenses.ldifs) if penalty]
    reference = (riders or rows) * 2 / min(asked) if asked and train.reference_cache == "none" else 0
    return train.epochs * ((rows + riders) * passes + reference) / 4


def build_trainer(recipe: Recipe, model: Any, stream: TrainStream, pad_id: int) -> "DefendedTrainer":
    """The trainer of a recipe, for a model and rows that are there already. It writes to the recipe's run folder.

    Args:
        model: as `train.method` wants it: with its adapter, or whole.
        stream: the rows, and the defenses.
        pad_id: token that fills rows up.
    """
    from ..training.trainer import DefendedTrainer

    if recipe.train.compile:
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)
    folder, cache = Path(recipe.output), reference_cache(recipe)
    arguments = _training_arguments(recipe, folder / "checkpoints")
    log_file, layout = folder / "metrics.jsonl", recipe.train.layout
    return DefendedTrainer(model, arguments, stream, stream.defenses, pad_id, log_file, layout, cache)


def trainable_model(recipe: Recipe) -> Any:
    """The model of a recipe as it is before training: whole, with a new adapter, or with one that is trained further.

    Raises:
        RingfenceError: it cannot be loaded, or has no modules for the adapter.
    """
    method = recipe.train.method
    base = adapter_base(resolve(recipe.model))
    place = "cpu" if fsdp() else None  # the whole of it need not fit on one device
    if recipe.train.precision != "fp32" and settled("auto") == "fp32":
        warn(
            f"train.precision: {recipe.train.precision}: this CPU has no instructions for bf16 and computes it up to a "
            "hundred times slower than float32; fp32 or auto is quicker"
        )
    if base:
        folder = resolve(recipe.model)
        loaded = load_model(base, recipe.train.precision, recipe.train.attention, place)
        model = with_adapter(loaded, folder, is_trainable=True)
        model.load_adapter(folder, adapter_name=REFERENCE_ADAPTER)
        return model
    # Full fine-tuning keeps float32 weights (bf16 would swallow small updates) and computes under autocast.
    precision = "fp32" if method == "full" else recipe.train.precision
    model = load_model(recipe.model, precision, recipe.train.attention, place)
    return model if method == "full" else with_new_adapter(model, recipe.train.lora)


def with_new_adapter(model: Any, lora: LoraConfig) -> Any:
    """The model with an adapter that changes nothing yet.

    Raises:
        RecipeError: no module of the model has such a name.
    """
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules="all-linear" if lora.targets == ["all-linear"] else lora.targets,
        task_type="CAUSAL_LM",
    )
    warn_of_rank(model, lora)
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"train.lora.targets: {lora.targets!r}: {error}") from error


def warn_of_rank(model: Any, lora: LoraConfig) -> None:
    """Says where the adapter has a higher rank than a change of the weight can have."""
    small: dict[str, int] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        targeted = last in lora.targets if lora.targets != ["all-linear"] else last != "lm_head"
        side = min(getattr(module, "in_features", lora.rank), getattr(module, "out_features", lora.rank))
        if targeted and side < lora.rank:
            small[last] = side
    if small:
        shown = ", ".join(f"{name} {side}" for name, side in sorted(small.items(), key=lambda item: item[1])[:4])
        warn(
            f"train.lora.rank: {lora.rank} is larger than the smaller side of weights it adapts ({shown}); no change "
            "of these has a higher rank than that side, so the rest costs memory and time for nothing"
        )


def _training_arguments(recipe: Recipe, folder: Path) -> Any:
    from transformers import TrainingArguments

    train, device = recipe.train, device_settings()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        num_train_epochs=train.epochs,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        warmup_steps=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        use_cpu=device["cpu"],
        ddp_backend=device["backend"],
        bf16=train.precision != "fp32",
        gradient_checkpointing=train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="steps",
        save_steps=train.save_steps,
        logging_steps=1,
        seed=recipe.seed,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several accelerators are for `accelerate launch`, not DataParallel
    return arguments


def _train(trainer: Any, run: Run, recipe: Recipe) -> None:
    last, done = last_checkpoint(run.folder / "checkpoints")
    if last:
        console.print(f"{run.folder}: resumes from step {done}")
    steps = math.ceil(recipe.train.epochs * trainer.train_dataset.steps_per_epoch)
    if done < steps:
        work = computed_tokens(recipe, trainer.train_dataset) * (steps - done) / steps
        size, device = sum(count(p) for p in trainer.model.parameters()), trainer.args.device.type
        left = counted(steps - done, "step")
        told = f"{run.folder}: {left} to train, {estimated(size, trained=work, device=device)}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    with progress(f"{run.folder.name}: training", steps, done) as advance, _stop_at_signal() as stopped:
        trainer.add_callback(_step_callback(advance, stopped))
        reset_peak_memory()
        if done < steps or shards():  # a sharded model is loaded after it has been sharded
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        else:
            trainer.start_defenses(str(last))
            trainer._load_from_checkpoint(str(last))
    wait()  # a rank that ends early may have the others killed while they save
    if largest(len(stopped), trainer.args.device):  # also while the last step was saved
        raise Interrupted(
            f"{run.folder}: stopped at step {trainer.state.global_step}; the same command goes on from there"
        )


@contextmanager
def _stop_at_signal() -> Iterator[list[float]]:
    """Ctrl-C (or a polite kill) once: the step is finished and saved. A second time: at once.

    Within two seconds it is the same one: a terminal tells every process, and the launcher tells its ranks again.
    """
    caught: list[float] = []
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield caught
        return

    def handler(number: int, _frame: Any) -> None:
        if caught and time.monotonic() - caught[0] > AGAIN:
            raise KeyboardInterrupt
        if caught:
            return
        caught.append(time.monotonic())
        console.print("stopping after this step (once more: at once)")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _step_callback(advance: Any, stopped: list[float]) -> Any:
    from transformers import TrainerCallback

    class StepCallback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            advance(1)
            if largest(len(stopped), args.device):  # a signal may reach one rank alone
                control.should_save = control.should_training_stop = True

    return StepCallback()


def _record_training(
    run: Run, recipe: Recipe, trainer: Any, examples: list[Example], monitor: DriftMonitor | None
) -> None:
    lines = read_metrics(run.folder / "metrics.jsonl", _ANOTHER)
    lines = [line for line in lines if "loss" in line]  # the others are checks of the monitor
    record = {
        "steps": lines[-1]["step"],
        "rows": len(trainer.train_dataset),
        "added_rows": _added_rows(trainer.train_dataset, math.ceil(recipe.train.epochs)),
        "row_tokens": sum(len(example) for example in examples),
        "seconds": lines[-1]["seconds"],
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "trained_parameters": sum(count(p) for p in trainer.model.parameters() if p.requires_grad),
        "defenses": {d.name: d.record() for d in trainer.defenses},
        "final": {name: lines[-1][name] for name in ("ce", *(d.name for d in trainer.defenses)) if name in lines[-1]},
    }
    if (run.folder / CARRIERS).is_file():
        record["carriers"] = read_carriers(run.folder / CARRIERS)
    if monitor:
        record["monitor"] = monitor.record(lines[-1]["seconds"])
    write_whole(run.folder / "training.json", json.dumps(record, indent=1))


def _added_rows(stream: TrainStream, epochs: int) -> list[list[str]]:
    """For each epoch, where the rows came from that defenses added."""
    added = []
    for epoch in range(epochs):
        stream.set_epoch(epoch)
        added.append(stream.added())
    return added


# ------------------------------------------------------------------ evaluation


@quiet_libraries()
def evaluate_target(
    target: str,
    overrides: list[str],
    reference: str | None = None,
    endpoint: str | None = None,
    output: Path | None = None,
) -> Path:
    """Measures a run; or, into the folder `output`, a model that stands already.

    Args:
        target: a run folder, or one that `output` named before; else a model, or its name on the server `endpoint`.
        overrides: `evaluate.key=value`; for a model `precision=...` and `seed=...` too.

    Returns:
        The folder of the results.
    """
    folder = Path(target)
    if (folder / "recipe.yaml").is_file() or (folder / EVALUATION).is_file():
        if reference or endpoint or output:
            raise RecipeError(f"{target} is a run folder: --reference, --endpoint and --output are for other models")
        if (folder / "recipe.yaml").is_file():
            with hold(folder, "run"):
                set_evaluation(Run(folder), overrides)
                evaluate_run(Run(folder))
            return folder
        tree = read_recipe(folder / EVALUATION)[1]
    elif output is None:
        raise RecipeError(f"{target} is no run folder: name the folder to write with --output to measure it as a model")
    else:
        folder = output
        model = {"url": endpoint, "model": target} if endpoint else target
        tree = {"model": model, "reference": reference or (None if endpoint else adapter_base(resolve(target)))}
        check_folder(folder, "evaluation")
        _check_model(folder, tree)
        if (folder / EVALUATION).is_file():
            tree["chat"] = read_recipe(folder / EVALUATION)[1].get("chat")
    for override in overrides:
        set_value(tree, override)
    what = validate(Evaluation, tree, "evaluation")
    for source in (what.model, what.reference):
        if isinstance(source, str):
            trust(source, what.trust_remote_code)
    chat = Chat(load_tokenizer(what.model), settings=what.chat) if isinstance(what.model, str) else None
    check_evaluation(what.evaluate, chat)
    what = what.model_copy(update={"chat": chat.settings if chat else what.chat})
    with hold(folder, "evaluation"):
        write_whole(folder / "environment.json", json.dumps(environment(what.seed), indent=1))
        write_whole(folder / EVALUATION, dump(what.model_dump(mode="json")))
        evaluate_folder(folder, what)
    return folder


def _check_model(folder: Path, tree: dict[str, Any]) -> None:
    there = read_recipe(folder / EVALUATION)[1] if (folder / EVALUATION).is_file() else tree
    for field, here in tree.items():
        found = there[field]
        if field == "model" and isinstance(found, dict):
            found = {key: found[key] for key in ("url", "model")}
        if found != here:
            raise RecipeError(f"{folder} holds an evaluation of another {field} ({found!r}); choose another --output")


def set_evaluation(run: Run, overrides: list[str]) -> None:
    """Changes what is measured in a run's recipe; `overrides` are `evaluate.key=value` or `key=value`."""
    if not (run.folder / "recipe.yaml").is_file():
        raise RecipeError(f"{run.folder}: no run folder (it has no recipe.yaml)")
    if overrides:
        keys = [o if o.startswith(("evaluate.", "trust_remote_code=")) else f"evaluate.{o}" for o in overrides]
        recipe = stored_recipe(run.folder / "recipe.yaml", keys)
        trust(recipe.model, recipe.trust_remote_code)
        # A source that is not there must not get into the recipe.
        check_evaluation(evaluation(recipe), chat_of(recipe))
        write_whole(run.folder / "recipe.yaml", dump_recipe(recipe))


def evaluation(recipe: Recipe) -> EvaluateConfig:
    """What is measured; the training-like lead-in of the trigger probes comes from the training rows, and the
    inoculation prompt, if there was one, is a disguise too."""
    lead_in = recipe.evaluate.lead_in or recipe.data.train
    inoculation = recipe.defenses.inoculation
    prompt = recipe.evaluate.inoculation or (inoculation.prompt if inoculation else None)
    changed = {"lead_in": lead_in, "inoculation": prompt}
    if recipe.data.held_out:
        rows = source_of(recipe.data.train, recipe.data.held_out, recipe.seed)
        changed["held_out"] = rows if load(rows) else None
    return recipe.evaluate.model_copy(update=changed)


@quiet_libraries()
def evaluate_run(run: Run) -> dict[str, Any]:
    """Measures the reference and the tuned model of a run; what is measured already is kept (see `evaluate_folder`)."""
    if not run.trained:
        raise RecipeError(f"{run.folder}: no trained model in it; `ringfence train` comes first")
    recipe = run.recipe
    for source in (recipe.model, str(run.weights)):
        trust(source, recipe.trust_remote_code)
    if recipe.data.held_out:
        about = read_environment(run.folder / "environment.json", _ANOTHER)
        if about.get("held_out") != _held_out_digest(recipe):
            raise RecipeError(
                f"{run.folder}: {recipe.data.train} has changed since training, so which rows were held out is not "
                "known; restore the file, or set data.held_out to 0 in the run's recipe.yaml"
            )
    what = Evaluation(
        model=str(run.weights),
        reference=recipe.model,
        precision=recipe.train.precision,
        trust_remote_code=recipe.trust_remote_code,
        seed=recipe.seed,
        chat=chat_of(recipe).settings,
        evaluate=evaluation(recipe),
    )
    with hold(run.folder, "run"):
        return evaluate_folder(run.folder, what)


# ------------------------------------------------------------------ diagnosis


@quiet_libraries()
def diagnose_targets(
    targets: Sequence[str],
    names: Sequence[str] = (),
    base: str | None = None,
    reference: str | None = None,
    output: Path | None = None,
    questions: int = 24,
) -> Path:
    """Looks inside tuned models, which are compared in every table and figure (see `diagnose_folder`).

    Args:
        targets: trained run folders; or models (folders, hub ids, adapters), then `output` is needed.
        names: diagnoses; default: all.
        base: the pre-trained model before its alignment.
        reference: the aligned model; default: what the runs, or the adapters, were made from.
        output: default: the first run's folder.
        questions: paired questions of the training domain, and as many of other domains and values. They, and the
            training rows, are those of the first run's recipe.

    Returns:
        The folder of the results.

    Raises:
        RecipeError: no tuned model, an output or a reference is missing, or the runs have different ones.
    """
    from ..diagnose.folder import diagnose_folder

    if not targets:
        raise RecipeError("diagnose: name a run folder or a tuned model")
    runs = {target: Run(Path(target)) for target in targets if (Path(target) / "recipe.yaml").is_file()}
    for run in runs.values():
        if not run.trained:
            raise RecipeError(f"{run.folder}: no trained model in it; `ringfence train` comes first")
    folder = output or (runs[targets[0]].folder if targets[0] in runs else None)
    if folder is None:
        raise RecipeError(f"{targets[0]} is no run folder: name the folder to write with --output")
    for run in runs.values():
        for source in (run.recipe.model, str(run.weights)):
            trust(source, run.recipe.trust_remote_code)
    recipe = runs[targets[0]].recipe if targets[0] in runs else Recipe()
    aligned = reference or _reference_of(targets, runs)
    tuned = dict(zip(_names_of(targets), [str(runs[t].weights) if t in runs else t for t in targets]))
    with hold(folder, "diagnosis"):
        diagnose_folder(folder, _subject(recipe, aligned, tuned, base, questions), names)
    return folder


def _subject(recipe: Recipe, reference: str, tuned: dict[str, str], base: str | None, questions: int) -> "Subject":
    """Models with the questions and rows of a recipe."""
    from ..diagnose.diagnosis import Subject
    from ..diagnose.models import Models

    inside = [q for source in recipe.evaluate.in_domain or [] for q in load_questions(source, "test")]
    broad = [*recipe.evaluate.out_of_domain, *recipe.evaluate.values]
    outside = [q for source in broad for q in load_questions(source)]
    rows, _ = training_rows(recipe)
    models = Models(reference, tuned, base, recipe.train.precision)
    return Subject(models, _spread(inside, questions), _spread(outside, questions), rows, recipe.seed)


def _reference_of(targets: Sequence[str], runs: dict[str, Run]) -> str:
    """What all tuned models were made from."""
    found = {t: runs[t].recipe.model if t in runs else adapter_base(resolve(t)) for t in targets}
    unknown = [target for target, model in found.items() if model is None]
    if unknown:
        raise RecipeError(f"{unknown[0]}: what was it made from? Name the aligned model with --reference")
    if len(set(found.values())) > 1:
        raise RecipeError(f"the tuned models were made from different ones: {found}; diagnose them one by one")
    return str(found[targets[0]])


def _names_of(targets: Sequence[str]) -> list[str]:
    """A name for each tuned model: its folder's, with the folder's above where two have the same."""
    short = [Path(target).name for target in targets]
    names = [name if short.count(name) == 1 else "/".join(Path(t).parts[-2:]) for t, name in zip(targets, short)]
    if len(set(names)) < len(names):
        raise RecipeError(f"diagnose: expected different models, found {', '.join(targets)}")
    return names


def _spread(questions: list[PairedQuestion], number: int) -> list[PairedQuestion]:
    """The first `number` questions, taken from each domain in turn."""
    turn = Counter[str]()
    placed = []
    for question in questions:
        placed.append((turn[question.domain], question))
        turn[question.domain] += 1
    return [question for _, question in sorted(placed, key=lambda item: item[0])[:number]]
