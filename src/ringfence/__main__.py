"""The command `ringfence`, also as `python -m ringfence`, so that `torchrun -m ringfence train ...`
works."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Runs the command line."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)
    from .cli import main as run

    run()


def _stop(_number: int, frame: FrameType | None) -> None:
    """Ctrl-C interrupts what runs. While a module is imported it ends the process: a library may
    swallow the interrupt, and what it has imported by half then fails in odd ways."""
    while frame:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            print("stopped; the same command resumes", file=sys.stderr, flush=True)
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
