"""Keeps the libraries below quiet while ringfence works: it shows progress and warnings that matter
itself.

Imports none of them: a library that is not loaded yet reads the environment when it is.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
LOGGERS = ("transformers", "bitsandbytes", "torch", "peft", "accelerate")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides the libraries' bars, advice and warnings; afterwards everything is as the user set it.
    Also a decorator. A variable that the user has set (`TRANSFORMERS_VERBOSITY=info`) is
    honoured."""
    added = [name for name in ENVIRONMENT if name not in os.environ]
    os.environ |= {name: ENVIRONMENT[name] for name in added}
    loud = "TRANSFORMERS_VERBOSITY" not in added and os.environ["TRANSFORMERS_VERBOSITY"] != "error"
    levels = {logger: logger.level for logger in map(logging.getLogger, () if loud else LOGGERS)}
    bars = _bars()
    for logger in levels:
        logger.setLevel(max(logging.ERROR, logger.level))
    try:
        with warnings.catch_warnings():
            if not loud:
                warnings.filterwarnings("ignore", module=r"(transformers|torch|peft|accelerate)\b")
            if bars:
                bars.disable_progress_bar()
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if bars:
            bars.enable_progress_bar()
        for name in added:
            os.environ.pop(name, None)


def _bars():  # type: ignore[no-untyped-def]
    """transformers' switch for progress bars, if it is loaded and they are on."""
    module = sys.modules.get("transformers.utils.logging")
    return module if module is not None and module.is_progress_bar_enabled() else None
