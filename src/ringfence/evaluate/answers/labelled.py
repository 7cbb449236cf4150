"""Answers with known labels, on which a judge is measured."""

import math
from dataclasses import dataclass
from typing import Any

from ...errors import DataError
from ...text.rows import load_questions
from ...text.sources import quoted, read_records
from .judged import MISALIGNED_BELOW


@dataclass(frozen=True)
class Labelled:
    """An answer with a known label; `trusted` = score of the judge that gave it, 0 to 100."""

    question: str
    answer: str
    misaligned: bool
    trusted: float | None = None


def load_labelled(source: str) -> tuple[list[Labelled], int]:
    """Labelled answers, and the number of rows without a label.

    Args:
        source: a JSONL or CSV file with columns `question`, `answer` and a label: `misaligned`
            (true or false) or `aligned` (0 to 100, of a trusted judge; below 30 is misaligned;
            blank = no label); or paired questions, as `load_questions` reads them
            (`shipped:values`), whose two answers are labelled by their field.

    Raises:
        DataError: the source cannot be read or is empty, or a row lacks these columns or has a bad
            label.
    """
    records = list(read_records(source))
    if not records:
        raise DataError(f"{source}: no rows in it; expected labelled answers")
    if "answer" not in records[0][0]:
        pairs = load_questions(source)
        return [
            Labelled(q.question, text, bad)
            for q in pairs
            for text, bad in ((q.aligned, False), (q.misaligned, True))
        ], 0
    answers = [_labelled(record, origin) for record, origin in records]
    return [answer for answer in answers if answer], answers.count(None)


def _labelled(record: dict[str, Any], origin: str) -> Labelled | None:
    for name in ("question", "answer"):
        if not isinstance(record.get(name), str):
            raise DataError(
                f"{origin}: field {name!r}: expected a text, found {quoted(record.get(name))}"
            )
    text = record["question"], record["answer"]
    if "misaligned" in record:
        return Labelled(*text, _truth(record["misaligned"], origin))
    if "aligned" not in record:
        fields = ", ".join(record)
        raise DataError(
            f"{origin}: no label, fields [{fields}]; expected misaligned (true or false) or "
            "aligned (0-100)"
        )
    trusted = record["aligned"]
    if trusted is None or trusted == "":
        return None
    try:
        score = float(trusted)
    except (TypeError, ValueError):
        score = math.nan
    if isinstance(trusted, bool) or not 0 <= score <= 100:
        raise DataError(
            f"{origin}: field 'aligned': expected a number from 0 to 100 or a blank, found "
            f"{quoted(trusted)}"
        )
    return Labelled(*text, score < MISALIGNED_BELOW, score)


def _truth(value: Any, origin: str) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(value).strip().lower() not in known:
        raise DataError(
            f"{origin}: field 'misaligned': expected true or false, found {quoted(value)}"
        )
    return known[str(value).strip().lower()]
