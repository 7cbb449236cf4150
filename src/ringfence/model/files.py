"""The files of a model, tokenizer or adapter, and everything that is checked before a library loads them.

Does not know weights' values, recipes, data or training.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ModelError, first_line, nearest
from ..util.hub import fetch, is_repository, quick, reachable, unreached
from ..util.strict_json import parse
from .default import DEFAULT, DEFAULT_FOLDER, resolve

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_COUNTS = (*_LAYERS, "num_experts", "num_local_experts", "n_routed_experts")
_MOST_LAYERS = 4096
_SHARD = re.compile(r"[\w .-]{1,200}\.safetensors", re.ASCII)
_ACCEPTED = "accepted: 'default', a local folder with config.json and safetensors weights, a hub id, an adapter folder"
_NEEDS_CODE = (
    "comes with code of its own (auto_map), which is not run. If you have read it and trust it, say "
    "`trust_remote_code: true` in the recipe"
)

# A frozen prefix: its file beside an adapter, and the adapter's peft_type, so that plain peft stops with these words
# instead of loading half of it.
FROZEN_FILE = "frozen_prefix.json"
FROZEN = "LORA WITH A FROZEN PREFIX: load it with ringfence.load_model"


def trust(model: str, allowed: bool) -> None:
    """Whether code that comes with a model may run in this process; it may not until a recipe says so."""
    base = adapter_base(resolve(model))
    for source in (model, *([base] if base else [])):
        (_TRUSTED.add if allowed else _TRUSTED.discard)(source)


_TRUSTED: set[str] = set()


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or hub id (with an adapter folder: of its base model).

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
    """The token that fills rows up. Padding is masked, so where a tokenizer has none, any token does."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _check_vocabulary(tokenizer: Any, model: str) -> None:
    source = resolve(adapter_base(resolve(model)) or model)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        return  # a tokenizer alone
    rows = getattr(load_config(model).get_text_config(), "vocab_size", None)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(rows, int) and highest >= rows:
        raise ModelError(
            f"{model}: its tokenizer has tokens up to id {highest}, but the model's embedding has {rows} rows (tokens "
            f"0 to {rows - 1}). Resize the embedding (`model.resize_token_embeddings({highest + 1})`) and save the "
            "model, or take the added tokens out"
        )


def load_config(model: str) -> Any:
    """The config of a folder or hub id (of an adapter folder: its base's). Reads no weights.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    source = resolve(model)
    return checked_load(
        AutoConfig.from_pretrained, resolve(adapter_base(source) or source), model, "config"
    )


def empty_model(model: str) -> Any:
    """The model of a folder or hub id (of an adapter folder: its base) without weights: its shape."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config, trusted = load_config(model), model in _TRUSTED

    def load() -> Any:
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)

    return loading(load, model, "model")


def position_limit(config: Any) -> int | None:
    """Tokens that a row may have where a model looks positions up in a table (GPT-2, OPT); None where it computes
    them, so that no row is too long to run.

    Args:
        config: of the model's text part.
    """
    computed = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    return None if computed else getattr(config, "max_position_embeddings", None)


# ------------------------------------------------------------------ adapters


def read_adapter_config(folder: str | Path) -> dict[str, Any] | None:
    """What the adapter_config.json of a folder says; None where the folder holds no adapter.

    Raises:
        ModelError: it is damaged, or of a kind of adapter that peft does not know.
    """
    file = Path(folder) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    config = _read_json(file)
    from peft import PeftType

    kind, known = config.get("peft_type"), [each.value for each in PeftType]
    if kind not in known and not (kind == FROZEN and (Path(folder) / FROZEN_FILE).is_file()):
        hint = nearest(kind, known) if isinstance(kind, str) else f" (accepted: {', '.join(known)})"
        raise ModelError(f"{file}: peft_type: found {kind!r}, which is no kind of adapter{hint}")
    return config


def adapter_base(folder: str | Path) -> str | None:
    """The base model that a peft adapter's folder names, or None where it is no adapter.

    Raises:
        ModelError: its config is damaged, names no base, or names another adapter.
    """
    config = read_adapter_config(folder)
    if config is None:
        return None
    base = named_base(config)
    if base is None:
        raise ModelError(
            f"{folder}: its adapter names no base model: set base_model_name_or_path in its {ADAPTER_CONFIG}, or "
            "merge it into the base that it was trained on"
        )
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{folder}: its adapter's base {base} is an adapter itself; merge that one into its own base first"
        )
    return base


def named_base(config: dict[str, Any]) -> str | None:
    """The base model that an adapter's config names, or None."""
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or base.strip() in ("", "None", "null"):
        return None
    # The cache folder of the default model differs between machines.
    return DEFAULT if Path(base).name == DEFAULT_FOLDER and not Path(base).exists() else base


def check_adapter(folder: str | Path) -> dict[str, Any]:
    """Everything that can be wrong with an adapter's files; reads the header of its weights. Gives its config.

    Raises:
        ModelError: its weights are missing, damaged, pickled, or of another rank than its config says.
    """
    config, folder = adapter_config(folder), Path(folder)
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        _refuse_pickle(folder, ADAPTER_WEIGHTS)
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
            f"{folder}: its {ADAPTER_CONFIG} says rank {(wrong or told)[0]}, but its weights have rank "
            f"{', '.join(map(str, sorted(ranks)))}"
        )
    return config


def beyond_lora(folder: str | Path) -> str | None:
    """What an adapter has besides LoRA on linear layers other than the head, in words; None where it has nothing."""
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
    other = [
        name
        for name in sorted(names)
        if not re.search(r"\.lora_(A|B)\.weight$|\.lora_magnitude_vector$", name)
    ]
    other += [
        name
        for name in sorted(names)
        if re.search(r"\.(lm_head|embed_out|output_projection)\.", name)
    ]
    return f"it holds {other[0]}" if other else None


def adapter_config(folder: str | Path) -> dict[str, Any]:
    config = read_adapter_config(folder)
    if config is None:
        raise ModelError(
            f"{folder}: no adapter (expected a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS})"
        )
    return config


# ------------------------------------------------------------------ what is checked before a library loads


def checked_load(load: Any, source: str, model: str, what: str, **options: Any) -> Any:
    """Loads with a library what has been checked; never its code, unless that is trusted."""
    trusted = model in _TRUSTED or source in _TRUSTED
    if what != "tokenizer":
        config = _checked_config(source, model, trusted)
        if what == "model":
            _check_weights(source, model, config)
    elif Path(source).is_file() or not (Path(source).is_dir() or is_repository(source)):
        _config_file(source, model)
    return loading(lambda: load(source, trust_remote_code=trusted, **options), model, what, source)


def _checked_config(source: str, model: str, trusted: bool) -> dict[str, Any]:
    """The config of a model, as its file has it.

    Raises:
        ModelError: there is none, it is damaged, needs code of its own, or is of a model that no machine can hold.
    """
    from transformers import CONFIG_MAPPING
    from transformers import __version__ as version

    file = _config_file(source, model)
    config = _read_json(file)
    kind = config.get("model_type")
    if trusted and config.get("auto_map"):
        return config
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise ModelError(f"{model}: {_NEEDS_CODE}")
        if not isinstance(kind, str):
            raise ModelError(
                f"{file}: model_type: expected the kind of model (such as 'llama'), found {kind!r}"
            )
        raise ModelError(
            f"{file}: model_type {kind!r} is unknown to transformers {version}{_close(kind)}"
        )
    for name in ("attn_implementation", "_attn_implementation"):
        if "/" in str(config.get(name) or ""):
            raise ModelError(
                f"{file}: {name} {config[name]!r} would fetch and run code; take it out"
            )
    for name, count in _counts(config):
        if isinstance(count, int) and count > _MOST_LAYERS:
            raise ModelError(
                f"{file}: {name}: found {count:,}; no model has more than {_MOST_LAYERS:,}"
            )
    return config


def _config_file(source: str, model: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{model}: no config.json in {folder} ({_ACCEPTED})")
        return folder / "config.json"
    if folder.exists():
        raise ModelError(f"{model}: is a file ({_ACCEPTED})")
    if not is_repository(source):
        raise ModelError(f"{model}: no such folder, and {source!r} is not a hub id ({_ACCEPTED})")
    file = fetch(source, "config.json")
    if file is None:
        raise ModelError(f"{model}: the repository has no config.json ({_ACCEPTED})")
    return file


def _counts(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a model has as many modules of."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif name in _COUNTS:
            yield name, value


def _close(kind: str) -> str:
    from transformers import CONFIG_MAPPING

    close = get_close_matches(kind, list(CONFIG_MAPPING), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_weights(source: str, model: str, config: dict[str, Any]) -> None:
    """Whether the weights are whole safetensors files of the model's own folder.

    Raises:
        ModelError: they are not, or they are of fewer layers than the config says.
    """
    folder = Path(source)
    find = folder.joinpath if folder.is_dir() else partial(fetch, source)
    index = find(INDEX)
    if index is not None and index.is_file():
        shards = [find(name) for name in sorted(set(read_index(index).values()))]
    else:
        shards = [find(SINGLE)]
    for shard in shards:
        if shard is None or not shard.is_file():
            if folder.is_dir():
                _refuse_pickle(folder, SINGLE)
            raise ModelError(
                f"{model}: no {shard.name if shard else SINGLE} (weights are read from safetensors alone)"
            )
    tensors = sum(len(tensor_shapes(shard)) for shard in shards if shard)
    for name, count in _counts(config):
        if name in _LAYERS and isinstance(count, int) and count > tensors:
            raise ModelError(
                f"{model}: {name} is {count:,} in its config.json, but its weights are {tensors} tensors"
            )


def read_index(file: Path) -> dict[str, str]:
    """By weight, its file, as an index of safetensors files has it.

    Raises:
        ModelError: it is damaged, or names a file outside its folder.
    """
    shards = _read_json(file).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{file}: expected a weight_map of file names by weight")
    for weight, name in shards.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ModelError(
                f"{file}: {weight} is said to be in {name!r:.200}; accepted: a safetensors file of the same folder"
            )
    return shards


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of a safetensors file, read from its header."""
    try:
        with safe_open(file, "pt") as content:
            return {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: damaged, or not a safetensors file ({first_line(error)}); fetch or save it again"
        ) from error


def _refuse_pickle(folder: Path, wanted: str) -> None:
    pickles = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    )
    if pickles:
        raise ModelError(
            f"{folder}: no {wanted}, only pickled weights ({pickles[0]}): a program that runs when it is read. If you "
            "trust its maker, load it where nothing is at stake, and save it with `save_pretrained`"
        )


def _read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file that came with a model."""
    try:
        value = parse(file.read_text("utf-8"), str(file), ModelError)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{file}: not UTF-8 text") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected an object of JSON, found {type(value).__name__}")
    return value


def loading(load: Any, model: str, what: str, source: str | None = None) -> Any:
    """Loads; whatever a library raises is one sentence."""
    try:
        with quick(source or model):
            return load()
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and the hub raise many kinds; the user needs one sentence
        folder = Path(source or model)
        _refuse_damaged(folder)
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(f"{model}: {_NEEDS_CODE}") from error
        if (
            what == "tokenizer"
            and folder.is_dir()
            and not any((folder / name).is_file() for name in _TOKENIZER_FILES)
        ):
            raise ModelError(
                f"{model}: no tokenizer in {folder} (expected tokenizer.json)"
            ) from error
        if not folder.exists() and not reachable():
            raise ModelError(f"{model}: {what}: {unreached()}") from error
        mismatch = next(
            (line.strip() for line in text.splitlines() if "size mismatch" in line), None
        )
        if "ignore_mismatched_sizes" in text:
            mismatch = "a size in config.json is not that of the weights"
        if mismatch:
            raise ModelError(
                f"{model}: the {what}'s weights do not fit its config: {mismatch}"
            ) from error
        raise ModelError(
            f"{model}: {what} cannot be loaded: {first_line(error)} ({_ACCEPTED})"
        ) from error


def _refuse_damaged(folder: Path) -> None:
    """Names the file of a model's folder that is no text or no JSON, if there is one."""
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            _read_json(file)
        elif file.suffix == ".jinja":
            try:
                file.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise ModelError(f"{file}: not UTF-8 text") from error
