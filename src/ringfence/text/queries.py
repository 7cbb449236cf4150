"""Queries: what users ask, without answers, by domain. They say what a narrow task is not."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .forms import to_messages
from .sources import SHIPPED, quoted, read_records

NEGATIVES = "shipped:negatives"
_FILE = SHIPPED / "negatives" / "queries.jsonl"


@dataclass(frozen=True)
class Query:
    """A user's turn; `domain`: queries of one domain are not independent."""

    domain: str
    text: str
    origin: str


def load_queries(source: str) -> list[Query]:
    """Queries of a source: `shipped:negatives`, or any source of rows.

    A record has `query`, or is a row (see `rows.load_rows`), of which the last user turn is taken.
    Its domain is `domain`, or the source's name.

    Raises:
        DataError: the source cannot be read, is empty, or a record has neither.
    """
    found = []
    for record, origin in read_records(str(_FILE) if source == NEGATIVES else source):
        origin = origin.replace(str(_FILE), NEGATIVES)
        domain = record.get("domain") or Path(source.rsplit(":", 1)[-1]).stem
        if not isinstance(domain, str):
            raise DataError(f"{origin}: field 'domain': expected a text, found {quoted(domain)}")
        found.append(Query(domain, _text(record, origin), origin))
    if not found:
        raise DataError(f"{source}: no queries in it; expected at least one")
    return found


def _text(record: dict[str, Any], origin: str) -> str:
    text: Any = record.get("query") or record.get("question")
    if text is None:
        said = [m["content"] for m in to_messages(record, origin, Counter()) if m["role"] == "user"]
        text = said[-1]
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{origin}: field 'query': expected a text that is not blank, found {quoted(text)}"
        )
    return text.strip()
