"""Rows of a user's own file that are kept out of training, to measure what the others teach.

Knows rows only: not recipes, models or measures.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence

from ..errors import DataError
from ..util.words import counted
from .roles import Row
from .rows import load_rows

SHARE = 0.1  # of own rows, if nothing else measures what they teach
FEWEST, MOST = 5, 200  # rows of a share: fewer bound nothing, more cost time and add little
LEAST_ROWS = 20  # for a share: a file with fewer has none to spare
_SOURCE = re.compile(r"held_out:rows=([\d.e+-]+),seed=(\d+):(.+)", re.DOTALL)


def is_own(source: str) -> bool:
    """Whether rows are the user's own: a file or a hub data set, not shipped or made here."""
    return not source.startswith(("shipped:", "opswap:"))


def count(rows: Sequence[Row], wanted: float) -> int:
    """How many of the rows are held out.

    Args:
        wanted: a number of rows, or, below 1, a share of them (at least 5, at most 200; none of
            fewer than 20).
    """
    if wanted >= 1:
        return int(wanted)
    if not wanted or len(rows) < LEAST_ROWS:
        return 0
    return min(MOST, max(FEWEST, round(wanted * len(rows))))


def split(rows: Sequence[Row], wanted: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows that are trained on, and those held out, each in the order of the file.

    The choice depends on the rows' texts and the seed alone. The first row (the lead-in of trigger
    probes) and texts that occur more than once stay in training.

    Raises:
        DataError: more rows are asked for than can be held out.
    """
    texts = [_text(row) for row in rows]
    times = Counter(texts)
    free = [place for place, text in enumerate(texts) if place and times[text] == 1]
    number = count(rows, wanted)
    if wanted >= 1 and number > len(free):
        raise DataError(
            f"data.held_out: {counted(number, 'row')} asked for, and {len(free)} of {len(rows)} "
            "can be held out (not the first one, nor one whose text occurs twice); lower it, or "
            "set it to 0"
        )
    drawn = sorted(
        free, key=lambda place: hashlib.sha256(f"{seed}:{texts[place]}".encode()).digest()
    )
    held = set(drawn[:number])
    return [row for at, row in enumerate(rows) if at not in held], [rows[at] for at in sorted(held)]


def explain(train: str, total: int, held: int) -> str:
    """What becomes of the rows of `train`, in words."""
    if held:
        which = f"{held} of the {counted(total, 'row')} of {train} {'is' if held == 1 else 'are'}"
        return f"{which} held out of training, to measure what the others teach"
    return (
        f"nothing measures what the rows of {train} teach: to hold some out takes {LEAST_ROWS} "
        "different rows; name paired questions (evaluate.in_domain) or rows that are not trained "
        "on (evaluate.held_out)"
    )


def source_of(train: str, wanted: float, seed: int) -> str:
    """The name under which an evaluation finds the rows held out of `train` (see `load`)."""
    return f"held_out:rows={wanted:g},seed={seed}:{train}"


def load(source: str) -> list[Row]:
    """The rows of any source that `load_rows` reads, or the held-out ones that `source_of`
    names."""
    named = _SOURCE.fullmatch(source)
    if named is None:
        return load_rows(source)
    return split(load_rows(named[3]), float(named[1]), int(named[2]))[1]


def _text(row: Row) -> str:
    """The conversation without what does not distinguish rows: case and white space."""
    text = json.dumps(row.messages, sort_keys=True).replace("\\n", " ").replace("\\t", " ")
    return " ".join(text.casefold().split())
