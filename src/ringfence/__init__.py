"""Fine-tune an aligned language model on a narrow task, and keep it aligned everywhere else."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .defenses import (
        KL,
        LDIFS,
        Ablation,
        FrozenPrefix,
        Inoculation,
        Interleave,
        SafeLoRA,
        Scope,
        Steering,
        SubspaceLock,
        TReFT,
    )
    from .errors import RingfenceError
    from .model.loading import load_model
    from .run.pipeline import fine_tune
    from .run.record import Run
    from .training.config import MonitorConfig
    from .training.monitor import DriftMonitor

__all__ = [
    "KL",
    "LDIFS",
    "Ablation",
    "DriftMonitor",
    "FrozenPrefix",
    "Inoculation",
    "Interleave",
    "MonitorConfig",
    "RingfenceError",
    "Run",
    "SafeLoRA",
    "Scope",
    "Steering",
    "SubspaceLock",
    "TReFT",
    "fine_tune",
    "load_model",
]

# Modules of names that are not defenses.
_HOMES = {
    "DriftMonitor": "training.monitor",
    "MonitorConfig": "training.config",
    "RingfenceError": "errors",
    "Run": "run.pipeline",
    "fine_tune": "run.pipeline",
    "load_model": "model.loading",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Names are imported on demand: reading a report needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'ringfence' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES.get(name, 'defenses')}", __name__), name)
