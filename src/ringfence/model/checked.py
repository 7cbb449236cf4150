"""What is checked before a library loads the files of a model, tokenizer or adapter.

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
_ACCEPTED = (
    "accepted: 'default', a local folder with config.json and safetensors weights, a hub id, an "
    "adapter folder"
)
_NEEDS_CODE = (
    "comes with code of its own (auto_map), which is not run. If you have read it and trust it, "
    "set `trust_remote_code: true` in the recipe"
)

# A frozen prefix: its file next to an adapter, and the adapter's peft_type, so that plain peft
# stops with these words instead of loading half of it.
FROZEN_FILE = "frozen_prefix.json"
FROZEN = "LORA WITH A FROZEN PREFIX: load it with ringfence.load_model"

# The same for a scope.
SCOPE_FILE = "scope.json"
SCOPED = "LORA WITH A SCOPE: load it with ringfence.load_model"
_MARKS = {FROZEN: FROZEN_FILE, SCOPED: SCOPE_FILE}

# Models whose own code may run in this process, see `files.trust`.
TRUSTED: set[str] = set()


def checked_load(load: Any, source: str, model: str, what: str, **options: Any) -> Any:
    """Checks files, then loads them with a library; code that comes with them only if it is
    trusted."""
    trusted = model in TRUSTED or source in TRUSTED
    if what != "tokenizer":
        config = _checked_config(source, model, trusted)
        if what == "model":
            _check_weights(source, model, config)
    elif Path(source).is_file() or not (Path(source).is_dir() or is_repository(source)):
        _config_file(source, model)
    return loading(lambda: load(source, trust_remote_code=trusted, **options), model, what, source)


def _checked_config(source: str, model: str, trusted: bool) -> dict[str, Any]:
    """A model's config, as in its file.

    Raises:
        ModelError: there is none, it is damaged, it needs code of its own, or no machine can hold
            the model.
    """
    from transformers import CONFIG_MAPPING
    from transformers import __version__ as version

    file = _config_file(source, model)
    config = read_json(file)
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
    """Numbers of modules in a config."""
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
    """Checks that the weights are whole safetensors files in the model's own folder.

    Raises:
        ModelError: they are not, or have fewer layers than the config says.
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
                refuse_pickle(folder, SINGLE)
            raise ModelError(
                f"{model}: no {shard.name if shard else SINGLE} (weights are read from safetensors "
                "alone)"
            )
    tensors = sum(len(tensor_shapes(shard)) for shard in shards if shard)
    for name, count in _counts(config):
        if name in _LAYERS and isinstance(count, int) and count > tensors:
            raise ModelError(
                f"{model}: {name} is {count:,} in its config.json, but its weights have {tensors} "
                "tensors"
            )


def read_index(file: Path) -> dict[str, str]:
    """The file of each weight, from an index of safetensors files.

    Raises:
        ModelError: it is damaged, or names a file outside its folder.
    """
    shards = read_json(file).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{file}: expected a weight_map of file names by weight")
    for weight, name in shards.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ModelError(
                f"{file}: {weight} is said to be in {name!r:.200}; accepted: a safetensors file of "
                "the same folder"
            )
    return shards


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file, read from its header."""
    try:
        with safe_open(file, "pt") as content:
            return {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: damaged, or not a safetensors file ({first_line(error)}); fetch or save it "
            "again"
        ) from error


def read_adapter_config(folder: str | Path) -> dict[str, Any] | None:
    """The content of a folder's adapter_config.json; None if the folder has no adapter.

    Raises:
        ModelError: it is damaged, or its kind of adapter is unknown to peft.
    """
    file = Path(folder) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    config = read_json(file)
    from peft import PeftType

    kind, known = config.get("peft_type"), [each.value for each in PeftType]
    mark = _MARKS.get(kind) if isinstance(kind, str) else None
    if kind not in known and not (mark and (Path(folder) / mark).is_file()):
        hint = nearest(kind, known) if isinstance(kind, str) else f" (accepted: {', '.join(known)})"
        raise ModelError(f"{file}: peft_type: found {kind!r}, which is not a kind of adapter{hint}")
    return config


def refuse_pickle(folder: Path, wanted: str) -> None:
    kinds = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in kinds)
    if pickles:
        raise ModelError(
            f"{folder}: no {wanted}, only pickled weights ({pickles[0]}): a program that runs when "
            "it is read. If you trust its maker, load it where nothing is at stake, and save it "
            "with `save_pretrained`"
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file that came with a model."""
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
    """Loads; whatever a library raises becomes one sentence."""
    try:
        with quick(source or model):
            return load()
    except ModelError:
        raise
    except Exception as error:  # many kinds are raised; the user needs one sentence
        folder = Path(source or model)
        _refuse_damaged(folder)
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(f"{model}: {_NEEDS_CODE}") from error
        has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
        if what == "tokenizer" and folder.is_dir() and not has_tokenizer:
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
    """Names a file of a model's folder that is not text or not JSON, if there is one."""
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            read_json(file)
        elif file.suffix == ".jinja":
            try:
                file.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise ModelError(f"{file}: not UTF-8 text") from error
