"""Where measurements are kept, and in what form."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ringfence.util.machine import environment

RESULTS = Path(__file__).parents[1] / "results" / "performance"


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median and quartiles, and the number of values."""
    low, median, high = (round(float(q), digits) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "low": low, "high": high, "n": len(values)}


def save(file: Path, found: dict[str, Any]) -> None:
    """Writes the results, with the machine that they come from."""
    where = environment(0)
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads"
    )
    machine = {name: where[name] for name in ("versions", "python", "platform", "git", "time")}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps({**found, "machine": {"device": device, **machine}}, indent=1) + "\n"
    )
    print(file)
