"""Which of several processes this one is, from the environment that `accelerate launch` and `torchrun` set. Imports no
torch, so that a command that needs none starts at once.
"""

import os


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Number of ranks."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """The main process alone prints and writes files that are not pieces of a checkpoint."""
    return rank() == 0
