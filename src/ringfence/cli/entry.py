"""The entry point: whatever goes wrong is one message on stderr, without a traceback.

Exit codes: 0 done; 1 a bug in ringfence; 2 something in the input is wrong (the message says what);
3 `gate` says HOLD; 130 interrupted (the same command resumes).
"""

import errno
import io
import os
import sys
import tempfile
import traceback
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..errors import RingfenceError, first_line, redact
from ..processes import is_main
from ..util.quiet import quiet_libraries
from . import inside, judges, models, results, rows, runs, scopes
from .app import app

# In the order of `ringfence --help`.
_COMMANDS = (
    runs.init,
    runs.run,
    runs.train,
    runs.evaluate,
    results.report,
    inside.diagnose,
    results.gate,
    results.export,
    results.card,
    runs.demo,
    inside.show_tokens,
    models.project,
    inside.screen,
    rows.train_misaligned,
    rows.score_gap,
    rows.regenerate,
    models.patch,
    scopes.scope,
    scopes.route,
    scopes.chat,
    models.capability,
    runs.schema,
)
for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(inside.persona, name="persona")
app.add_typer(judges.judge, name="judge")


def main() -> None:
    """Entry point: whatever goes wrong is one message on stderr, without a traceback."""
    try:
        if not is_main():  # only one of several processes prints; all report errors
            sys.stdout = io.StringIO()
        with quiet_libraries():
            code = app(standalone_mode=False)
        if code == 130:  # typer's code for Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
    except BrokenPipeError:  # `ringfence export RUN | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except BaseException as error:
        code = _tell(error)
    sys.exit(code if isinstance(code, int) else 0)


def _tell(error: BaseException) -> int:
    """Prints what went wrong, and returns the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if hasattr(error, "format_message"):  # an unknown option, a missing argument
        from typer import rich_utils

        rich_utils.rich_format_error(error)  # type: ignore[arg-type]
        return int(getattr(error, "exit_code", 2))
    interrupted = type(error).__name__ == "Interrupted"
    if isinstance(error, RingfenceError):
        return _say(str(error), 130 if interrupted else 2)
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return _say("stopped; the same command resumes", 130)
    if isinstance(error, OSError) and (
        error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    ):
        place = f"{error.filename}: " if error.filename else ""
        return _say(f"{place}{error.strerror}", 2)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        what = f"out of memory ({first_line(error)})"
        return _say(f"{what}; `--dry-run` estimates what a run needs", 2)
    log = _keep_log(error)
    where = f"; its traceback is in {log}" if log else ""
    what = f"{type(error).__name__}: {redact(first_line(error))}"
    return _say(f"an error of ringfence itself: {what}{where}", 1)


def _say(message: str, code: int) -> int:
    prefix = "" if code == 130 else "error: "
    Console(stderr=True).print(Text.assemble((prefix, "bold red"), message), soft_wrap=True)
    return code


def _keep_log(error: BaseException) -> Path | None:
    """Where the traceback was written; None if it cannot be written."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="ringfence-error-", suffix=".log", delete=False
        ) as log:
            log.write(redact(text))
    except OSError:
        return None
    return Path(log.name)
