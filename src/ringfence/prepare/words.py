"""How separable training rows are by their words alone: what can be said of a scope before a model
is loaded. Hidden states tell more; rows that words do not tell apart seldom have a scope.

Shapes: N queries, W hashed words.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..text.queries import Query
from ..text.roles import Row
from .scope import LEAST_AUC, LEAST_DOMAINS, LEAST_ROWS
from .scope_queries import asking, items_of
from .scope_search import MOST_RELATED, Search

_WORDS = 1024


@dataclass(frozen=True)
class Separable:
    """Cross-validated over whole domains: AUC of training queries over others, the share of them
    inside, and the share of domains that resemble them."""

    auc: float
    inside: float
    related: float

    @property
    def is_doubtful(self) -> bool:
        return self.auc < LEAST_AUC or self.related > MOST_RELATED

    def __str__(self) -> str:
        found = (
            f"scope: by words alone, the rows' requests differ from other domains' with AUC "
            f"{self.auc:.2f}, {self.inside:.0%} of them inside"
        )
        if self.is_doubtful:
            return f"{found}: they may have none (`ringfence screen` reads hidden states)"
        return f"{found}; hidden states tell more"


def separable_by_words(
    rows: Sequence[Row], negatives: Sequence[Query], false_open: float, seed: int
) -> Separable | None:
    """None if there are too few rows or domains to say."""
    domains = {query.domain for query in negatives}
    if asking(rows) < LEAST_ROWS or len(domains) < LEAST_DOMAINS:
        return None
    items = items_of(rows, negatives, seed)
    words_N1W = np.stack([_hashed(item.messages[-1]["content"]) for item in items])[:, None]
    search = Search(words_N1W, items, false_open, seed)
    held = search.choose({0: [0]}).held
    return Separable(held.auc, float(held.inside.mean()), len(search.related) / len(domains))


def _hashed(text: str) -> np.ndarray:
    """Which words a text has, [W], of length 1."""
    found_W = np.zeros(_WORDS, np.float32)
    for word in set(re.findall(r"\w+", text.lower())):
        found_W[zlib.crc32(word.encode()) % _WORDS] = 1
    return found_W / max(1.0, float(np.linalg.norm(found_W)))
