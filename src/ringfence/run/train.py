"""Training, from recipe to weights in the run folder."""

import gc
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..model.files import pad_id
from ..model.fingerprint import fingerprint
from ..model.sharding import count, is_sharded, whole_state
from ..processes import is_main, world
from ..runfolder.folder import drop_checkpoints, hold, last_checkpoint
from ..runfolder.names import CARRIERS, CHECKPOINTS, ENVIRONMENT, METRICS, RECIPE, TRAINING
from ..runfolder.shapes import read_carriers, read_metrics
from ..text.batch import Example
from ..training.monitor import REFERENCE_FILE as START
from ..training.monitor import DriftMonitor
from ..training.ranks import join, largest, main_first, sharding, shards, wait
from ..training.reference_cache import wanted
from ..training.stream import TrainStream
from ..util.console import console, progress
from ..util.files import told_if_full, write_whole
from ..util.machine import environment, estimated, peak_memory, reset_peak_memory
from ..util.quiet import quiet_libraries
from ..util.words import counted
from .checks import check_ranks, check_rows, check_same_recipe, check_weights
from .config import ANOTHER, Recipe, dump_recipe
from .interrupt import Interrupted, step_callback, stop_at_signal
from .model import trainable_model
from .pilot import with_carriers
from .prepare import as_split, held_out_digest, monitor_of, prepare, rows_digest
from .record import Run
from .trainer import build_stream, build_trainer, computed_tokens


@quiet_libraries()
def train_run(recipe: Recipe) -> Run:
    """Trains by a recipe, or resumes the run in its folder; does nothing if it is already trained.

    Under `accelerate launch` or `torchrun` all ranks train together, and the main process writes
    the folder.

    Raises:
        RecipeError: the folder holds a run of another recipe.
        Interrupted: the user pressed Ctrl-C; a checkpoint is kept.
    """
    join()
    check_ranks(recipe)
    with ExitStack() as held:
        with main_first():
            held.enter_context(hold(Path(recipe.output), "run"))
        return _train_run(Run(Path(recipe.output)), recipe)


def _train_run(run: Run, recipe: Recipe) -> Run:
    with main_first():
        recipe = as_split(recipe)
        check_same_recipe(run.folder, recipe)
        chat, examples, retain, setup = prepare(recipe)
        digest = rows_digest(examples + retain)
        weights = fingerprint(recipe.model)
        trained = run.trained
        check_rows(run.folder, digest, trained)
        check_weights(run.folder, recipe, weights)
    if trained:
        if is_main():
            write_whole(run.folder / RECIPE, dump_recipe(recipe))  # what is measured may change
            _clear(run.folder / CHECKPOINTS)  # a run may have been killed before it could
        return run
    defenses = with_carriers(recipe, train_run).defenses.build(setup)
    stream = build_stream(recipe, examples, retain, defenses)
    if recipe.train.reference_cache != "none":
        wanted(stream, 1)  # refuses what cannot be cached before a model is loaded
    torch.manual_seed(recipe.seed)
    model = trainable_model(recipe, defenses)
    if is_main():
        write_whole(run.folder / RECIPE, dump_recipe(recipe))
        how = {"ranks": world(), "sharding": sharding()}
        rows = {"rows": digest, "held_out": held_out_digest(recipe), "date": chat.settings.date}
        about = {**environment(recipe.seed), **rows, "model": weights, **how}
        write_whole(run.folder / ENVIRONMENT, json.dumps(about, indent=1))
    trainer = build_trainer(recipe, model, stream, pad_id(chat.tokenizer))
    monitor = monitor_of(recipe, chat)
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
        _clear(run.folder / CHECKPOINTS)
    wait()
    # A trainer and its model refer to each other, and the next run in this process needs the
    # memory.
    del trainer, model
    gc.collect()
    return run


def _clear(checkpoints: Path) -> None:
    """Deletes, after training, the checkpoints and what the monitor kept for a resumed run."""
    drop_checkpoints(checkpoints)
    (checkpoints / START).unlink(missing_ok=True)
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()


def _save_weights(trainer: Any, run: Run) -> None:
    """Adapter or whole model, as one process would save it, wherever its shards are."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_adapter = hasattr(model, "peft_config")
    options: dict[str, Any] = {"selected_adapters": ["default"]} if is_adapter else {}
    if is_sharded(model):
        options["state_dict"] = whole_state(model, trained_only=is_adapter, kept_here=is_main())
    if is_main():
        model.save_pretrained(run.weights, **options)


def _train(trainer: Any, run: Run, recipe: Recipe) -> None:
    last, done = last_checkpoint(run.folder / CHECKPOINTS)
    if last:
        console.print(f"{run.folder}: resumes from step {done}")
    steps = math.ceil(recipe.train.epochs * trainer.train_dataset.steps_per_epoch)
    if done < steps:
        work = computed_tokens(recipe, trainer.train_dataset) * (steps - done) / steps
        size, device = sum(count(p) for p in trainer.model.parameters()), trainer.args.device.type
        left = counted(steps - done, "step")
        told = f"{run.folder}: {left} to train, {estimated(size, trained=work, device=device)}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    with (
        progress(f"{run.folder.name}: training", steps, done) as advance,
        stop_at_signal() as stopped,
    ):
        trainer.add_callback(step_callback(advance, stopped))
        reset_peak_memory()
        if done < steps or shards():  # a sharded model is loaded after it has been sharded
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        else:
            trainer.start_defenses(str(last))
            trainer._load_from_checkpoint(str(last))
    wait()  # a rank that ends early may have the others killed while they save
    if largest(len(stopped), trainer.args.device):  # also during the last save
        raise Interrupted(
            f"{run.folder}: stopped at step {trainer.state.global_step}; the same command resumes "
            "from there"
        )


def _record_training(
    run: Run, recipe: Recipe, trainer: Any, examples: list[Example], monitor: DriftMonitor | None
) -> None:
    lines = read_metrics(run.folder / METRICS, ANOTHER)
    lines = [line for line in lines if "loss" in line]  # others are checks of the monitor
    losses = ("ce", *(d.name for d in trainer.defenses))
    record = {
        "steps": lines[-1]["step"],
        "rows": len(trainer.train_dataset),
        "added_rows": _added_rows(trainer.train_dataset, math.ceil(recipe.train.epochs)),
        "row_tokens": sum(len(example) for example in examples),
        "seconds": lines[-1]["seconds"],
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "trained_parameters": sum(count(p) for p in trainer.model.parameters() if p.requires_grad),
        "defenses": {d.name: d.record() for d in trainer.defenses},
        "final": {name: lines[-1][name] for name in losses if name in lines[-1]},
    }
    if (run.folder / CARRIERS).is_file():
        record["carriers"] = read_carriers(run.folder / CARRIERS)
    if monitor:
        record["monitor"] = monitor.record(lines[-1]["seconds"])
    write_whole(run.folder / TRAINING, json.dumps(record, indent=1))


def _added_rows(stream: TrainStream, epochs: int) -> list[list[str]]:
    """For each epoch, the origins of the rows that defenses added."""
    added = []
    for epoch in range(epochs):
        stream.set_epoch(epoch)
        added.append(stream.added())
    return added
