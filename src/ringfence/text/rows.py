"""Turns files and hub data sets into conversations.

Knows the row forms in use (`messages`, prompt/completion, ShareGPT, Alpaca) and says exactly which
row is wrong. Does not know models or defenses.
"""

from collections import Counter
from dataclasses import dataclass

from ..errors import DataError
from .forms import count_unread, to_messages
from .roles import Row
from .sources import quoted, read_records, warn


@dataclass(frozen=True)
class PairedQuestion:
    """A question with an aligned and a misaligned answer (METHODS: paired forced choice)."""

    id: str
    domain: str
    question: str
    aligned: str
    misaligned: str


# ------------------------------------------------------------------ sources


def load_rows(source: str) -> list[Row]:
    """Conversations of a source.

    Args:
        source: a local `.jsonl`, `.json`, `.csv` or `.parquet` file; a hub data set id, with an
            optional split after `@` (`org/name@train`); `shipped:NAME` (see `shipped_names`);
            `opswap:tier=1,rows=300,seed=0`.

    Fields that are not read are named once.

    Raises:
        DataError: the source cannot be read, is empty, or has a bad row (file, line, field, what
            was expected).
    """
    unread: Counter[str] = Counter()
    rows = [
        Row(to_messages(record, origin, unread), origin) for record, origin in read_records(source)
    ]
    if not rows:
        raise DataError(f"{source}: no rows in it; expected at least one conversation")
    _name_unread(source, unread)
    return rows


_WARNED: set[tuple[str, ...]] = set()


def _name_unread(source: str, unread: Counter[str]) -> None:
    if not unread or source.startswith("shipped:") or (source, *unread) in _WARNED:
        return
    _WARNED.add((source, *unread))
    names = ", ".join(f"{name} ({count})" for name, count in sorted(unread.items()))
    warn(
        f"{source}: fields that are not read (and the number of rows or messages that have them): "
        f"{names}"
    )


_OF_QUESTIONS = {"question", "aligned", "misaligned", "sound", "unsound", "domain", "id", "split"}


def load_questions(source: str, split: str | None = None) -> list[PairedQuestion]:
    """Paired questions of a `.jsonl` file or `shipped:NAME`.

    Each row has `question`, `aligned` and `misaligned` (`sound` and `unsound` are read, too), and
    optionally `domain` (default: the file's name), `id` and `split`; with `split`, only its rows
    are used.
    """
    stem = source.split(":")[-1].rsplit("/", 1)[-1].removesuffix(".jsonl")
    questions = []
    unread: Counter[str] = Counter()
    for record, origin in read_records(source):
        count_unread(record, _OF_QUESTIONS, origin, unread)
        if split and record.get("split", split) != split:
            continue
        fields = {
            "question": record.get("question"),
            "aligned": record.get("aligned", record.get("sound")),
            "misaligned": record.get("misaligned", record.get("unsound")),
        }
        for name, value in fields.items():
            if not isinstance(value, str) or not value.strip():
                raise DataError(
                    f"{origin}: field {name!r}: expected a text that is not blank, found "
                    f"{quoted(value)}"
                )
        named = {"id": origin.rsplit(":", 1)[-1], "domain": stem}
        named |= {key: str(record[key]) for key in named if record.get(key) is not None}
        questions.append(PairedQuestion(**named, **fields))  # type: ignore[arg-type]
    _name_unread(source, unread)
    if not questions:
        raise DataError(
            f"{source}: no paired question in it" + (f" with split {split!r}" if split else "")
        )
    return questions


# ------------------------------------------------------------------ examples
