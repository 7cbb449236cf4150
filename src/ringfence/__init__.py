"""Fine-tune an aligned language model on a narrow task, and keep it aligned everywhere else."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .defenses import KL, Ablation, Inoculation, Interleave, SafeLoRA, Steering, SubspaceLock, TReFT
    from .errors import RingfenceError
    from .monitor import DriftMonitor, MonitorConfig
    from .run import Run, fine_tune

__all__ = [
    "KL",
    "Ablation",
    "DriftMonitor",
    "Inoculation",
    "Interleave",
    "MonitorConfig",
    "RingfenceError",
    "Run",
    "SafeLoRA",
    "Steering",
    "SubspaceLock",
    "TReFT",
    "fine_tune",
]

_HOMES = {
    "Ablation": "defenses",
    "DriftMonitor": "monitor",
    "Inoculation": "defenses",
    "MonitorConfig": "monitor",
    "KL": "defenses",
    "Interleave": "defenses",
    "SafeLoRA": "defenses",
    "Steering": "defenses",
    "SubspaceLock": "defenses",
    "TReFT": "defenses",
    "RingfenceError": "errors",
}


def __getattr__(name: str) -> Any:
    """Names are imported when asked for: reading a report needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'ringfence' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES.get(name, 'run')}", __name__), name)
