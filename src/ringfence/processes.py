"""Which of several processes this one is, from the environment that `accelerate launch` and
`torchrun` set. Imports no torch, so that a command that does not need it starts at once.
"""

import os
from typing import Any


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Number of ranks."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Only the main process prints, and writes files other than pieces of a checkpoint."""
    return rank() == 0


def from_main(found: Any) -> Any:
    """What the main process found, on every rank; all must call it, and have met before."""
    if world() == 1:
        return found
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([found])[0]
