"""What every door must do with whatever it is given, how long it may take, and the count of what
was tried.

The property: a door gives a value, or refuses with a `RingfenceError` whose text is short,
printable and names what was read; it takes a few seconds of computing at the most, and writes
nothing outside the folder it was given. Knows no door.

`RINGFENCE_FUZZ=10000` tries about that many examples instead of a few hundred, and writes what it
counted to `fuzz.json` (or to the file in `RINGFENCE_FUZZ_LOG`).
"""

import json
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from ringfence.errors import RingfenceError

FEW = 400
TOTAL = int(os.environ.get("RINGFENCE_FUZZ", FEW))
SECONDS = 5.0  # of computing: other processes may be busy too
LINE, LINES = 600, 12  # longest line of a message, most lines


def tries(share: float) -> Any:
    """Settings for `share` of all examples. The few of a normal run are always the same ones."""
    few = TOTAL <= FEW
    return settings(
        max_examples=max(1, round(TOTAL * share)),
        derandomize=few,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


# ------------------------------------------------------------------ the count


@dataclass
class Tally:
    """What came of the examples of one door."""

    examples: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    # By kind and place, the smallest input seen.
    failures: dict[str, str] = field(default_factory=dict)

    def fail(self, kind: str, given: Any) -> None:
        shown = repr(given)
        if len(shown) < len(self.failures.get(kind, shown + " ")):
            self.failures[kind] = shown


TALLIES: dict[str, Tally] = defaultdict(Tally)


def write_log(file: Path) -> None:
    """The count of this process, as JSON."""
    doors = {
        door: {
            "examples": tally.examples,
            "accepted": tally.accepted,
            "refused": sum(tally.errors.values()),
            "failures": {kind: given[:2_000] for kind, given in tally.failures.items()},
            "seconds": round(tally.seconds, 1),
            "slowest": round(tally.slowest, 2),
            "messages": dict(tally.errors.most_common()),
        }
        for door, tally in sorted(TALLIES.items())
    }
    total = {
        name: sum(door[name] for door in doors.values())
        for name in ("examples", "accepted", "refused")
    }
    total["failures"] = sum(len(door["failures"]) for door in doors.values())
    file.write_text(json.dumps({"total": total, "doors": doors}, indent=1) + "\n", "utf-8")


def message_class(text: str) -> str:
    """A message without what it quotes: names of files, numbers, values."""
    text = re.sub(r"\S*/\S*", "PATH", text.splitlines()[0])
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", text)
    text = re.sub(r"\d+", "N", text)
    return text[:110]


# ------------------------------------------------------------------ the property


class TooSlow(BaseException):
    """Not an Exception: no door may swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends what computes for longer than `seconds`."""

    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


_WRITES = {
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
}
_watched: list[tuple[list[Path], list[str]]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or not (event in _WRITES or event == "open"):
        return
    if event == "open" and not (
        isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    ):
        return
    if (
        event in ("os.remove", "os.rmdir") and arguments[1] != -1
    ):  # named from within a folder that is being removed
        return
    allowed, found = _watched[-1]
    for name in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
        if isinstance(name, str | bytes | os.PathLike):
            path = Path(os.path.abspath(os.fsdecode(name)))
            if (
                not any(path.is_relative_to(folder) for folder in allowed)
                and "__pycache__" not in path.parts
            ):
                found.append(f"{event} {path}")


sys.addaudithook(_audit)


@contextmanager
def writes_only_in(folders: Sequence[Path]) -> Iterator[list[str]]:
    """Lists what is written, made, moved or removed outside some folders meanwhile."""
    found: list[str] = []
    own = Path(os.environ["RINGFENCE_CACHE"])
    _watched.append(([*folders, own, Path("/dev"), Path("/proc/self/clear_refs")], found))
    try:
        yield found
    finally:
        _watched.pop()


class Wrong(AssertionError):
    """A door broke its word; the text says how."""


def knock(
    door: str,
    given: Any,
    call: Callable[[], Any],
    folder: Path,
    names: Sequence[str] = (),
    seconds: float = SECONDS,
) -> Any:
    """What a door makes of an input: its value, or the error with which it refuses it.

    Args:
        given: the input, for the log.
        folder: the only place where anything may be written.
        names: a message must hold one of them, where there are any.
        seconds: of computing that it may take.
    """
    tally = TALLIES[door]
    tally.examples += 1
    started = time.process_time()
    try:
        with writes_only_in([folder]) as strays, time_limit(seconds):
            value = call()
        tally.accepted += 1
    except RingfenceError as error:
        tally.errors[message_class(f"{type(error).__name__}: {error}")] += 1
        value = error
    except (Exception, TooSlow) as error:
        tally.fail(f"{type(error).__name__} at {_place(error)}", given)
        raise Wrong(f"{type(error).__name__} at {_place(error)}: {str(error)[:300]}") from None
    finally:
        tally.seconds += (took := time.process_time() - started)
        tally.slowest = max(tally.slowest, took)
    try:
        if isinstance(value, RingfenceError):
            check_message(str(value), names)
        if strays:
            raise Wrong(f"written outside: {strays[:3]}")
    except Wrong as wrong:
        tally.fail(re.sub(r"\d+", "N", wrong.args[0][:200]), given)
        raise
    return value


def check_message(text: str, names: Sequence[str] = ()) -> None:
    """Whether a message is a sentence for people."""
    found = text.splitlines()
    if not text.strip() or "Traceback" in text:
        raise Wrong(f"not a sentence: {text[:200]!r}")
    if max(map(len, found)) > LINE or len(found) > LINES:
        size = f"{len(found)} lines, up to {max(map(len, found))} characters"
        raise Wrong(f"too long: {message_class(text)} ({size})")
    if any(not line.isprintable() for line in text.split("\n")):
        raise Wrong(f"not printable: {message_class(ascii(text))}")
    if names and not any(name in text for name in names):
        raise Wrong(f"names none of {list(names)}: {text[:200]}")


def _place(error: BaseException) -> str:
    """Where our code was when an error came through it, and what it called."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/ringfence/" in frame.filename]
    found = (own or frames)[-1]
    return f"{Path(found.filename).name}:{found.lineno} {found.name}"
