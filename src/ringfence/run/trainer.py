"""The trainer of a recipe: rows in order, the reference's cache, transformers' arguments."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..defenses import Defense
from ..model.default import resolve
from ..model.files import adapter_base, empty_model, load_config
from ..model.fingerprint import fingerprint
from ..model.layers import decoder_layers
from ..processes import world
from ..runfolder.names import CHECKPOINTS, METRICS
from ..text.batch import Example
from ..training.ranks import device_settings
from ..training.reference_cache import ReferenceCache
from ..training.stream import TrainStream
from .config import Recipe

if TYPE_CHECKING:
    from ..training.trainer import DefendedTrainer


def build_stream(
    recipe: Recipe, examples: list[Example], retain: list[Example], defenses: list[Defense]
) -> TrainStream:
    """Rows in the order of training, with those that defenses add."""
    step_rows = recipe.train.batch_size * recipe.train.accumulation * world()
    return TrainStream(examples, retain, defenses, step_rows, recipe.seed)


def computed_tokens(recipe: Recipe, stream: TrainStream) -> float:
    """The computation of all epochs, in tokens of a plain LoRA step.

    Such a token needs 4 operations per weight (forward, and backward through frozen weights). A
    trained weight needs 2 more, checkpointing 2 more, a token of the reference 2.
    """
    train, defenses = recipe.train, recipe.defenses
    rows, retain = sum(map(len, stream.rows)), sum(len(row) for of in stream.riders for row in of)
    passes = (6 if train.method == "full" else 4) + (2 if train.gradient_checkpointing else 0)
    asked = [getattr(config, "every", 1) for config in defenses.configs() if config.runs_reference]
    reference = 0.0
    if asked and train.reference_cache == "none":
        reference = (retain or rows) * 2 / min(asked)
    return train.epochs * ((rows + retain) * passes + reference) / 4


def build_trainer(
    recipe: Recipe, model: Any, stream: TrainStream, pad_id: int
) -> "DefendedTrainer":
    """The trainer of a recipe for a given model and rows. It writes to the recipe's run folder.

    Args:
        model: as `train.method` needs it: with its adapter, or whole.
        stream: the rows, and the defenses.
        pad_id: token for padding.
    """
    from ..training.trainer import DefendedTrainer

    if recipe.train.compile:
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)
    folder, cache = Path(recipe.output), reference_cache(recipe)
    arguments = _training_arguments(recipe, folder / CHECKPOINTS)
    log_file, layout = folder / METRICS, recipe.train.layout
    return DefendedTrainer(
        model, arguments, stream, stream.defenses, pad_id, log_file, layout, cache
    )


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
    """Bytes of one position in the reference's cache.

    A final hidden state in the type of the weights, or ids (4 bytes) and log-probabilities (4
    bytes) of tokens.
    """
    train = recipe.train
    if train.reference_cache == "top_k":
        return 8 * train.top_k
    byte = 4 if train.method == "full" or train.precision == "fp32" else 2
    return byte * int(load_config(recipe.model).get_text_config().hidden_size)


def _training_arguments(recipe: Recipe, folder: Path) -> Any:
    from transformers import TrainingArguments

    train, device = recipe.train, device_settings()
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        num_train_epochs=train.epochs,
        learning_rate=train.learning_rate,
        lr_scheduler_type=schedule,
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
    # Several accelerators are for `accelerate launch`, not for DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
