"""The command `ringfence`, also as `python -m ringfence`, so that `torchrun -m ringfence train ...`
works."""

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Runs the command line. During its import, too, Ctrl-C prints no traceback, and no library may
    swallow it."""
    before = signal.signal(signal.SIGINT, _stop)
    from .cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


def _stop(*_: Any) -> None:
    print("stopped; the same command resumes", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    main()
