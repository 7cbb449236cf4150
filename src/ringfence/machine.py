"""What machine and versions a run had, how much memory it took and there is, and about how long work takes.

Does not know recipes, data or training.
"""

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

from .words import about

PARAMETERS, CORES = 135e6, 2  # of the figures below
TRAINED, SCORED, WRITTEN = 300, 1_600, 100  # tokens a second


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


def whole_memory() -> int:
    """Bytes that this machine has for a run: of one accelerator; else main memory, or what a container may take."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    if sys.platform == "win32":
        return 0
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    stated = [limit.read_text().strip() for limit in limits if limit.is_file()]
    return min([found, *(int(limit) for limit in stated if limit.isdigit())])


def device_type() -> str:
    """Where a run computes here: `cpu`, `cuda` and so on."""
    return str(torch.accelerator.current_accelerator().type) if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]


def seconds(parameters: int, scored: float = 0, written: float = 0, trained: float = 0) -> float:
    """About how long a CPU takes, from counts alone; nothing is measured here.

    The basis: on two cores the default model with its 135M parameters trains a LoRA at about 300 tokens a second and
    scores 1,400 to 2,000 (docs). Writing at 100 in a batch of a dozen answers is assumed, not measured. All three are
    taken to grow with the cores that torch uses and to fall with the parameters. Meant to be within a factor of two for
    that model, which was not checked against a whole run; other CPUs, loaded machines and large models are further off.

    Args:
        parameters: of the whole model.
        scored: tokens of given answers and their prompts.
        written: tokens of greedy answers, at most.
        trained: tokens of rows that are trained on, each reference pass counted as half a token more.
    """
    work = trained / TRAINED + scored / SCORED + written / WRITTEN
    return work * (parameters / PARAMETERS) * (CORES / torch.get_num_threads())


def estimated(parameters: int, scored: float = 0, written: float = 0, trained: float = 0, device: str = "cpu") -> str:
    """The same in words; on an accelerator, for which there are no figures, `time not estimated`."""
    if device != "cpu":
        return f"time not estimated on {device}"
    return about(seconds(parameters, scored, written, trained))
