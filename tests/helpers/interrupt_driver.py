"""Runs ringfence's command line and stops it at a named point: a job a line on stdin.

A job is {"folder", "cache", "args", "output"} and, where it is to be stopped, "point", "at" and
"signal": the process sends itself the signal at the n-th call of a function of ringfence, before or
after what that function does; the signal "ENOSPC" is what the system says of a full disk. Each job
is a forked child, so torch is imported once. Answers with the exit status, negative for a signal.
Knows no test.
"""

import errno
import functools
import importlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from helpers.documents import draw_nothing

# Where a process can be stopped: function, its first call in question, and what its first argument
# must contain.
POINTS: dict[str, tuple[str, str, int, str]] = {
    "step": ("ringfence.training.trainer", "DefendedTrainer._end_step", 3, ""),
    "last step": ("ringfence.training.trainer", "DefendedTrainer._end_step", 6, ""),
    "checkpoint begun": ("ringfence.training.trainer", "begin_checkpoint", 2, ""),
    "checkpoint": ("ringfence.training.trainer", "end_checkpoint", 2, ""),
    "last checkpoint": ("ringfence.training.trainer", "end_checkpoint", 3, ""),
    "adapter": ("ringfence.run.train", "_save_weights", 1, ""),
    "training record": ("ringfence.run.train", "_record_training", 1, ""),
    "evaluation, tuned": ("ringfence.evaluate.parts", "write_whole", 2, "run/"),
    "evaluation, reference": ("ringfence.evaluate.parts", "write_whole", 2, "reference-"),
    "report": ("ringfence.report.page", "write_whole", 1, ""),
    "reference cache": ("ringfence.training.reference_cache", "save_file", 2, ""),
    "sampling": ("ringfence.evaluate.answers.sampling", "append", 1, "run/"),
    "judging": ("ringfence.evaluate.answers.judge", "ScoreCache.put", 2, ""),
    "judgements": ("ringfence.evaluate.answers.judge", "write_judged", 1, ""),
    "diagnosis": ("ringfence.diagnose.folder", "write_whole", 3, ""),
}
# What a run imports, and what it would import late.
IMPORTS = [
    "ringfence.run.pipeline",
    "ringfence.training.trainer",
    "ringfence.training.reference_cache",
    "ringfence.report.page",
    "ringfence.report.terminal",
    "ringfence.diagnose.folder",
    "ringfence.evaluate.answers.judge",
    "ringfence.evaluate.answers.sampling",
    "matplotlib.backends.backend_svg",
    "scipy.stats",
]


def stop(name: str) -> None:
    if name == "ENOSPC":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the file")
    os.kill(os.getpid(), getattr(signal, name))


def stop_at(point: str, at: str, signal_name: str) -> None:
    module_name, name, turn, part = POINTS[point]
    owner: Any = importlib.import_module(module_name)
    *outer, name = name.split(".")
    for step in outer:
        owner = getattr(owner, step)
    original, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        now = part in str(args[0]) and next(calls) == turn
        if now and at == "half":  # of a file that a library writes by itself
            Path(args[1]).write_bytes(b"half a file")
        if now and at != "after":
            stop(signal_name)
        result = original(*args, **kwargs)
        if now and at == "after":
            stop(signal_name)
        return result

    setattr(owner, name, patched)


def work(job: dict[str, Any]) -> int:
    for number in (1, 2):
        os.dup2(os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(job["folder"])
    os.environ["RINGFENCE_CACHE"] = job["cache"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from ringfence import cli
    from ringfence.training import reference_cache

    # Several files of several batches.
    reference_cache.SHARD_ROWS, reference_cache.BATCH_TOKENS = (4, 200)
    if job.get("point"):
        stop_at(job["point"], job["at"], job["signal"])
    sys.argv = ["ringfence", *job["args"]]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for pytest
    for name in IMPORTS:
        importlib.import_module(name)
    Figure.savefig = draw_nothing  # type: ignore[method-assign]
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 99
            try:
                code = work(json.loads(line))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
