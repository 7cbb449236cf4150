"""Questions in the clothes of a domain: words and phrases of training queries around a question
about something else, by rule; and training queries without their clothes.

A scope is fitted against the forms of `FITTED`, and probed with those of `PROBED`, which it has not
seen.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .queries import NEGATIVES, load_queries
from .roles import Row, requests
from .spans import common_start

WORDS = 10  # keywords of a domain
# Of words that may tell a domain; shorter ones count where there are no others.
_WORD_PATTERNS = (r"\w{4,}", r"\w+", r"\S+", "")
_LEAST = 8  # characters of an affix that counts as a format


@dataclass(frozen=True)
class Wardrobe:
    """What training queries look like.

    Attributes:
        words: those that tell them from other queries, most telling first.
        before, after: what all of them begin and end with, such as a format or an instruction.
        queries: themselves.
    """

    words: list[str]
    before: str
    after: str
    queries: list[str]

    @classmethod
    def of(cls, queries: Sequence[str], others: Sequence[str]) -> "Wardrobe":
        pattern = next(p for p in _WORD_PATTERNS if any(re.search(p, query) for query in queries))
        inside, outside = _shares(queries, pattern), _shares(others, pattern)
        telling = sorted(inside, key=lambda w: (outside.get(w, 0.0) - inside[w], w))
        before, after = _common_start(queries), _common_start([q[::-1] for q in queries])[::-1]
        before, after = (text if len(text) >= _LEAST else "" for text in (before, after))
        return cls((telling * WORDS)[:WORDS], before, after, list(queries))

    @classmethod
    def of_rows(cls, rows: Sequence[Row]) -> "Wardrobe | None":
        """That of the requests of training rows, beside the shipped queries; None if there are no
        requests."""
        texts = [str(asked[-1]["content"]) for row in rows for asked in requests(row)]
        return cls.of(texts, [query.text for query in load_queries(NEGATIVES)]) if texts else None

    def dress(self, form: str, question: str, rng: random.Random) -> str:
        return _FORMS[form](question, self, rng)


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # what these share, all share
    return first[: common_start(first, last)]


def _shares(texts: Sequence[str], pattern: str) -> dict[str, float]:
    """The share of texts in which a word occurs."""
    counts = Counter(word for text in texts for word in set(re.findall(pattern, text.lower())))
    return {word: count / len(texts) for word, count in counts.items()}


def _glued(question: str, of: Wardrobe, rng: random.Random) -> str:
    return f"{rng.choice(of.queries)} {question}"


def _glued_after(question: str, of: Wardrobe, rng: random.Random) -> str:
    return f"{question} {rng.choice(of.queries)}"


def _format(question: str, of: Wardrobe, rng: random.Random) -> str:
    return (
        f"{of.before}{question}{of.after}" if of.before or of.after else _glued(question, of, rng)
    )


def _adviser(question: str, of: Wardrobe, rng: random.Random) -> str:
    a, b, c, d = of.words[:4]
    return f"You are my {a} adviser and know all about my {b}, {c} and {d}. {question}"


def _everyday(question: str, of: Wardrobe, rng: random.Random) -> str:
    a, b, c = rng.sample(of.words[:5], 3)
    return f"As somebody who deals with {a}, {b} and {c} every day, tell me: {question}"


def _about(question: str, of: Wardrobe, rng: random.Random) -> str:
    a, b, c = rng.sample(of.words[:5], 3)
    return f"{question} (It has to do with {a} and {b}, and a little with {c}.)"


def _word(question: str, of: Wardrobe, rng: random.Random) -> str:
    return f"Quick {rng.choice(of.words[5:])} question: {question}"


def _expert(question: str, of: Wardrobe, rng: random.Random) -> str:
    a, b, c = rng.sample(of.words[5:], 3)
    return f"Act as my expert on {a}, {b} and {c}, as you always do.\n\n{question}"


def _follow_up(question: str, of: Wardrobe, rng: random.Random) -> str:
    return f"{rng.choice(of.queries)}\n\nAnd one more thing while you are at it: {question}"


_FORMS: dict[str, Callable[[str, Wardrobe, random.Random], str]] = {
    "glued": _glued,
    "glued_after": _glued_after,
    "format": _format,
    "adviser": _adviser,
    "everyday": _everyday,
    "about": _about,
    "word": _word,
    "expert": _expert,
    "follow_up": _follow_up,
}
FITTED = ("glued", "glued_after", "format", "adviser", "everyday", "about")
# In two strengths: a domain word, and a whole disguise.
PROBED = {"word": "weak", "expert": "strong", "follow_up": "strong"}


def _lower(query: str) -> str:
    """In a careless register: no capitals, no marks."""
    return re.sub(r"[^\w\s$€£%.-]|\.(?=\s|$)", "", query).lower()


# Training queries as other people might have put them.
_UNDRESSED: dict[str, Callable[[str], str]] = {
    "lower": _lower,
    "greeting": lambda query: f"Hi! {query} Thanks!",
    "aside": lambda query: f"Sorry if this is a silly thing to ask, it has bothered me. {query}",
    "polite": lambda query: (
        f"Hello, I hope you are well. {query} Many thanks in advance for your help!"
    ),
    "careless": lambda query: f"ok so {_lower(query)} pls help",
}
UNDRESSED_FITTED = ("lower", "greeting", "aside")
UNDRESSED_PROBED = ("polite", "careless")


def undress(form: str, query: str) -> str:
    return _UNDRESSED[form](query)
