"""The model of a recipe before training."""

import re
from collections.abc import Sequence
from typing import Any

from ..defenses import Defense
from ..errors import RecipeError
from ..model.default import resolve
from ..model.files import adapter_base
from ..model.layers import causal_lm, decoder_layers
from ..model.loading import load_model, with_adapter
from ..model.precision import settled
from ..text.sources import warn
from ..training.ranks import fsdp
from ..training.reference import ADAPTER as REFERENCE_ADAPTER
from .config import LoraConfig, Recipe


def trainable_model(recipe: Recipe, defenses: Sequence[Defense] = ()) -> Any:
    """The model of a recipe before training: whole, with a new adapter, or with an existing one.
    Defenses may read the reference before it gets a new adapter.

    Raises:
        RingfenceError: it cannot be loaded, or has no modules for the adapter.
    """
    method = recipe.train.method
    base = adapter_base(resolve(recipe.model))
    place = "cpu" if fsdp() else None  # it need not fit on one device
    if recipe.train.precision != "fp32" and settled("auto") == "fp32":
        warn(
            f"train.precision: {recipe.train.precision}: this CPU has no instructions for bf16 and "
            "computes it up to a hundred times slower than float32; fp32 or auto is faster"
        )
    if base:
        folder = resolve(recipe.model)
        loaded = load_model(base, recipe.train.precision, recipe.train.attention, place)
        model = with_adapter(loaded, folder, is_trainable=True)
        model.load_adapter(folder, adapter_name=REFERENCE_ADAPTER)
        return model
    # Full fine-tuning keeps float32 weights (bf16 would swallow small updates) and computes under
    # autocast.
    precision = "fp32" if method == "full" else recipe.train.precision
    model = load_model(recipe.model, precision, recipe.train.attention, place)
    if method == "full":
        return model
    first = max([1, *(defense.before_adapter(model) for defense in defenses)])
    return with_new_adapter(model, recipe.train.lora, first)


def with_new_adapter(model: Any, lora: LoraConfig, first_layer: int = 1) -> Any:
    """The model with an adapter that changes nothing yet, on the layers from `first_layer` on.

    Raises:
        RecipeError: no module of the model has this name.
    """
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules="all-linear" if lora.targets == ["all-linear"] else lora.targets,
        exclude_modules=_layers_before(model, first_layer),
        task_type="CAUSAL_LM",
    )
    warn_of_rank(model, lora)
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"train.lora.targets: {lora.targets!r}: {error}") from error


def _layers_before(model: Any, first: int) -> str | None:
    """A regular expression for the modules of the layers before `first`."""
    if first == 1:
        return None
    layers = decoder_layers(model)
    name = next(name for name, module in causal_lm(model).named_modules() if module is layers)
    return rf"{re.escape(name)}\.({'|'.join(map(str, range(first - 1)))})\..*"


def warn_of_rank(model: Any, lora: LoraConfig) -> None:
    """Warns if the adapter has a higher rank than a change of the weight can have."""
    small: dict[str, int] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        targeted = last in lora.targets if lora.targets != ["all-linear"] else last != "lm_head"
        sides = (getattr(module, side, lora.rank) for side in ("in_features", "out_features"))
        side = min(sides)
        if targeted and side < lora.rank:
            small[last] = side
    if small:
        smallest = sorted(small.items(), key=lambda item: item[1])[:4]
        shown = ", ".join(f"{name} {side}" for name, side in smallest)
        warn(
            f"train.lora.rank: {lora.rank} is larger than the smaller side of weights it adapts "
            f"({shown}); no change of these has a higher rank than that side, so the rest only "
            "costs memory and time"
        )
