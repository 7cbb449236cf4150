"""Ctrl-C or SIGTERM: the step is finished and saved, and the same command resumes the run."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import RingfenceError
from ..training.ranks import largest
from ..util.console import console

AGAIN = 2.0  # seconds between a first and a second signal


class Interrupted(RingfenceError):
    """The user stopped a run; the same command resumes where it stopped."""


@contextmanager
def stop_at_signal() -> Iterator[list[float]]:
    """After one Ctrl-C (or SIGTERM) the step is finished and saved; a second one stops at once.

    Within two seconds it is the same one: a terminal signals every process, and the launcher
    signals its ranks again.
    """
    caught: list[float] = []
    # Signals reach only the main thread.
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handler(number: int, _frame: Any) -> None:
        if caught and time.monotonic() - caught[0] > AGAIN:
            raise KeyboardInterrupt
        if caught:
            return
        caught.append(time.monotonic())
        console.print("stopping after this step (once more: at once)")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def step_callback(advance: Any, stopped: list[float]) -> Any:
    from transformers import TrainerCallback

    class StepCallback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            advance(1)
            if largest(len(stopped), args.device):  # a signal may reach only one rank
                control.should_save = control.should_training_stop = True

    return StepCallback()
