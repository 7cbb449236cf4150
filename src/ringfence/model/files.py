"""The tokenizer, config and shape of a model, by folder or hub id, and the files of an adapter.
Reads no weights.

Does not know recipes, data or training.
"""

import re
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .checked import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TRUSTED,
    checked_load,
    loading,
    read_adapter_config,
    refuse_pickle,
    tensor_shapes,
)
from .default import DEFAULT, DEFAULT_FOLDER, resolve


def trust(model: str, allowed: bool) -> None:
    """Sets whether code that comes with a model may run in this process; by default it may not."""
    base = adapter_base(resolve(model))
    for source in (model, *([base] if base else [])):
        (TRUSTED.add if allowed else TRUSTED.discard)(source)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or hub id (for an adapter folder: of its base model).

    Raises:
        ModelError: there is none, it cannot be read, or it has more tokens than the model.
    """
    from transformers import AutoTokenizer

    source = resolve(model)
    base = adapter_base(source)
    if base and not (Path(source) / "tokenizer_config.json").is_file():
        source = resolve(base)
    tokenizer = checked_load(AutoTokenizer.from_pretrained, source, model, "tokenizer")
    _check_vocabulary(tokenizer, model)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """The token that fills rows up. Padding is masked, so if a tokenizer has none, any token will
    do."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _check_vocabulary(tokenizer: Any, model: str) -> None:
    source = resolve(adapter_base(resolve(model)) or model)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        return  # a tokenizer alone
    rows = getattr(load_config(model).get_text_config(), "vocab_size", None)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(rows, int) and highest >= rows:
        raise ModelError(
            f"{model}: its tokenizer has tokens up to id {highest}, but the model's embedding has "
            f"{rows} rows (tokens 0 to {rows - 1}). Resize the embedding "
            f"(`model.resize_token_embeddings({highest + 1})`) and save the model, or take the "
            "added tokens out"
        )


def load_config(model: str) -> Any:
    """The config of a folder or hub id (for an adapter folder: its base's). Reads no weights.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    source = resolve(model)
    source = resolve(adapter_base(source) or source)
    return checked_load(AutoConfig.from_pretrained, source, model, "config")


def empty_model(model: str) -> Any:
    """The model of a folder or hub id (for an adapter folder: its base) without weights: only its
    shape."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config, trusted = load_config(model), model in TRUSTED

    def load() -> Any:
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)

    return loading(load, model, "model")


def position_limit(config: Any) -> int | None:
    """Tokens that a row may have if the model looks positions up in a table (GPT-2, OPT); None if
    it computes them, so that no row is too long to run.

    Args:
        config: that of the model's text part.
    """
    computed = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    return None if computed else getattr(config, "max_position_embeddings", None)


# ------------------------------------------------------------------ adapters


def adapter_base(folder: str | Path) -> str | None:
    """The base model that a peft adapter's folder names, or None if it is not an adapter.

    Raises:
        ModelError: its config is damaged, names no base, or names another adapter.
    """
    config = read_adapter_config(folder)
    if config is None:
        return None
    base = named_base(config)
    if base is None:
        raise ModelError(
            f"{folder}: its adapter names no base model: set base_model_name_or_path in its "
            f"{ADAPTER_CONFIG}, or merge it into the base that it was trained on"
        )
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{folder}: its adapter's base {base} is an adapter itself; merge that one into its "
            "own base first"
        )
    return base


def named_base(config: dict[str, Any]) -> str | None:
    """The base model that an adapter's config names, or None."""
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or base.strip() in ("", "None", "null"):
        return None
    # The default model's cache folder differs between machines.
    return DEFAULT if Path(base).name == DEFAULT_FOLDER and not Path(base).exists() else base


def check_adapter(folder: str | Path) -> dict[str, Any]:
    """Checks an adapter's files, reading only the header of its weights. Returns its config.

    Raises:
        ModelError: its weights are missing, damaged, pickled, or of a rank that its config does not
            state.
    """
    config, folder = adapter_config(folder), Path(folder)
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        refuse_pickle(folder, ADAPTER_WEIGHTS)
        raise ModelError(f"{folder}: its adapter has no weights (expected {ADAPTER_WEIGHTS})")
    shapes = tensor_shapes(file)
    ranks = {
        shape[0]
        for name, shape in shapes.items()
        if "lora_A." in name or "lora_embedding_A" in name
    }
    pattern = config.get("rank_pattern") or {}
    told = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [])]
    wrong = [rank for rank in told if ranks and (not isinstance(rank, int) or rank > max(ranks))]
    if wrong or (ranks and not ranks & {rank for rank in told if isinstance(rank, int)}):
        raise ModelError(
            f"{folder}: its {ADAPTER_CONFIG} says rank {(wrong or told)[0]}, but its weights have "
            f"rank {', '.join(map(str, sorted(ranks)))}"
        )
    return config


def beyond_lora(folder: str | Path) -> str | None:
    """What an adapter has besides LoRA on linear layers other than the head, in words; None if
    nothing."""
    config = check_adapter(folder)
    if config.get("peft_type") != "LORA":
        return f"it is a {config.get('peft_type')} adapter"
    bias = config.get("bias") or "none"
    if bias != "none":
        return f"it trains biases (bias: {bias})"
    for name in (
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "alora_invocation_tokens",
    ):
        if config.get(name):
            return f"it has {name}"
    names = tensor_shapes(Path(folder) / ADAPTER_WEIGHTS)
    known = re.compile(r"\.lora_(A|B)\.weight$|\.lora_magnitude_vector$")
    head = re.compile(r"\.(lm_head|embed_out|output_projection)\.")
    other = [name for name in sorted(names) if not known.search(name)]
    other += [name for name in sorted(names) if head.search(name)]
    return f"it holds {other[0]}" if other else None


def adapter_config(folder: str | Path) -> dict[str, Any]:
    config = read_adapter_config(folder)
    if config is None:
        raise ModelError(
            f"{folder}: no adapter (expected a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS})"
        )
    return config
