"""A run's machine and versions, the memory it took and the memory there is, and about how long work
takes.

Does not know recipes, data or training.
"""

import os
import platform
import resource
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .words import about

# Shares of a linear layer's speed, for each parameter, that training, scoring and writing reach
# (docs/development.md).
TRAINED, SCORED, WRITTEN = 0.3, 0.6, 0.1


def environment(seed: int) -> dict[str, Any]:
    """Versions, machine and revision: what a figure depends on besides the recipe."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    packages = ("ringfence", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")
    return {
        "versions": {name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": str(device),
        "git": _revision(),
        "seed": seed,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _revision() -> str | None:
    """The git revision of this checkout; None if ringfence is installed from a package."""
    if not (Path(__file__).parents[2] / ".git").exists():
        return None
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        here = Path(__file__).parent
        done = subprocess.run(command, capture_output=True, text=True, cwd=here)
        return done.stdout.strip() or None
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
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def whole_memory() -> int:
    """Bytes that this machine has for a run: those of one accelerator, else main memory, or what a
    container may use."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    if sys.platform == "win32":
        return 0
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ]
    stated = [limit.read_text().strip() for limit in limits if limit.is_file()]
    return min([found, *(int(limit) for limit in stated if limit.isdigit())])


def device_type() -> str:
    """The kind of device that runs compute on here: `cpu`, `cuda` and so on."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return str(found.type) if found else "cpu"


@cache
def speed() -> float:
    """Multiplications per second of this CPU in a linear layer of the default model, in float32:
    the best of ten, which takes some 50 ms."""
    tokens, inputs, outputs = 256, 576, 1536
    # Random ones would advance a run's random numbers.
    x, weight = torch.ones(tokens, inputs), torch.ones(outputs, inputs)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - started)
    return tokens * inputs * outputs / min(times)


def seconds(parameters: int, scored: float = 0, written: float = 0, trained: float = 0) -> float:
    """About how long this CPU takes: one multiplication per token and parameter, at a share of its
    `speed`.

    The shares were measured on the default model in float32, on one kind of CPU. The result should
    be within a factor of two there; weights in bf16, if the CPU has instructions for it, are scored
    up to three times faster.

    Args:
        parameters: of the whole model.
        scored: tokens of given answers and their prompts.
        written: tokens of greedy answers, at most.
        trained: tokens of rows that are trained on; each reference pass adds half a token.
    """
    return parameters / speed() * (trained / TRAINED + scored / SCORED + written / WRITTEN)


def estimated(
    parameters: int, scored: float = 0, written: float = 0, trained: float = 0, device: str = "cpu"
) -> str:
    """`seconds` in words; on an accelerator, for which there are no figures,
    `time not estimated`."""
    if device != "cpu":
        return f"time not estimated on {device}"
    return about(seconds(parameters, scored, written, trained))
