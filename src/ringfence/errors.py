"""One exception tree. Every message names the field or file and line, what was found and what is accepted."""

from collections.abc import Iterable
from difflib import get_close_matches

from .util.redact import redact

LONGEST, MOST = 600, 12  # characters of a line, lines of a message


class RingfenceError(Exception):
    """Base of all errors that a user can mend. The command line prints its text and exits with 2.

    A message quotes what was found, which may be a key, commands for the terminal or a million letters: keys are taken
    out here, what does not print is spelt out, and what is long is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_plain(redact(message)))


class RecipeError(RingfenceError):
    """A recipe names an unknown field or holds a value that is not accepted."""


class DataError(RingfenceError):
    """A data file or one of its rows cannot be used."""


class ChatError(RingfenceError):
    """A conversation cannot be rendered, or its roles cannot be found."""


class ModelError(RingfenceError):
    """A model, tokenizer or adapter cannot be loaded or does not fit."""


class DefenseError(RingfenceError):
    """A defense cannot do its work: no token of its role, no layer seen, no gradient."""


def _plain(text: str) -> str:
    lines = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in text.split("\n")]
    if len(lines) > MOST:
        lines = [*lines[: MOST - 1], f"... and {len(lines) - MOST + 1} more"]
    return "\n".join(line if len(line) <= LONGEST else f"{line[:450]} ... {line[-100:]}" for line in lines)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` when a known name is close to `name`, else the list of known names."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else f" (accepted: {', '.join(known)})"


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
