"""What machine and versions a run had, and how much memory it took or will take. Does not know data or training."""

import os
import platform
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .config import Recipe
from .defenses.base import PenaltyConfig
from .models import empty_model, load_config


def environment(seed: int) -> dict[str, Any]:
    """Versions, machine and revision: what a figure depends on beside the recipe."""
    packages = ("ringfence", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")
    return {
        "versions": {name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu",
        "git": _revision(),
        "seed": seed,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _revision() -> str | None:
    """The git revision of this checkout; None where ringfence is installed from a package."""
    if not (Path(__file__).parents[2] / ".git").exists():
        return None
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip() or None
    except OSError:
        return None


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes: of the accelerator, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_estimate(recipe: Recipe, longest: int) -> str:
    """Weights, gradients, optimiser and the largest batch's activations, in GiB, from the model's shape alone."""
    model = empty_model(recipe.model)
    text = model.config.get_text_config()
    weights = sum(p.numel() for p in model.parameters())
    full = recipe.train.method == "full"
    byte = 4 if full or recipe.train.precision == "fp32" else 2
    stored = 0.5 if recipe.train.precision == "nf4" else byte
    rank = recipe.train.lora.rank
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    trained = weights if full else sum(rank * (m.in_features + m.out_features) for m in linear)
    # Per token and layer about 34 hidden sizes of activations are kept; with checkpointing one.
    kept = 1 if recipe.train.gradient_checkpointing else 34
    activations = recipe.train.batch_size * longest * text.num_hidden_layers * text.hidden_size * kept * byte
    penalties = any(isinstance(config, PenaltyConfig) for config in recipe.defenses.configs())
    head = model.get_output_embeddings().weight.numel()
    copied = {"none": weights, "states": head, "top_k": 0}[recipe.train.reference_cache]
    copy = copied * byte if full and penalties else 0
    parts = {
        "weights": weights * stored,
        "reference copy": copy,
        "gradients and optimiser": trained * 12,
        "activations": activations,
    }
    shown = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items() if value)
    return f"memory, estimated: {sum(parts.values()) / 2**30:.2f} GiB ({shown})"


def position_bytes(recipe: Recipe) -> int:
    """What one position takes in the reference's cache: a final hidden state in the type of the weights, or the ids (4
    bytes) and log-probabilities (4 bytes) of tokens."""
    train = recipe.train
    if train.reference_cache == "top_k":
        return 8 * train.top_k
    byte = 4 if train.method == "full" or train.precision == "fp32" else 2
    return byte * int(load_config(recipe.model).get_text_config().hidden_size)
