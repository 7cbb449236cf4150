"""The queries that a scope is fitted to: training queries and queries of other domains, plain and
in other forms (`text.dress`)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..text.dress import FITTED, UNDRESSED_FITTED, Wardrobe, undress
from ..text.queries import Query
from ..text.roles import Messages, Row, requests

AFTER = "after a turn"  # of negatives that follow a training conversation


@dataclass(frozen=True)
class Item:
    """A query, and how it counts."""

    sort: str  # positive, plain, dressed
    domain: str  # of negatives; of positives the number of the row
    form: str
    messages: Messages
    text: str
    origin: str


def asking(rows: Sequence[Row]) -> int:
    """How many rows have a request."""
    return sum(1 for row in rows if requests(row))


def items_of(rows: Sequence[Row], negatives: Sequence[Query], seed: int) -> list[Item]:
    """Training queries, plain and undressed; queries of other domains, plain and in the training
    queries' clothes."""
    rng = random.Random(f"scope {seed}")
    turns = [(messages, row) for row in rows for messages in requests(row)]
    texts = [messages[-1]["content"] for messages, _ in turns]
    wardrobe = Wardrobe.of(texts, [query.text for query in negatives])
    before = [messages[:-1] for messages, _ in turns if len(messages) > 1]
    items: list[Item] = []
    numbers: dict[str, int] = {}
    for (messages, row), text in zip(turns, texts):
        # Rows that ask the same, and the turns of one row, are left out of the fit together.
        own = str(numbers.setdefault(text, numbers.setdefault(row.origin, len(numbers))))
        said = {"plain": messages[-1:], "whole": messages}
        for form in ("whole", "plain") if len(messages) > 1 else ("plain",):
            items.append(Item("positive", own, form, said[form], text, row.origin))
        form = UNDRESSED_FITTED[len(items) % len(UNDRESSED_FITTED)]
        asked = {"role": "user", "content": undress(form, text)}
        items.append(Item("positive", own, form, [asked], text, row.origin))

    def negative(sort: str, form: str, query: Query, text: str) -> Item:
        # What precedes a request does not tell: half of them follow what training queries follow.
        follows = rng.choice(before) if before and rng.random() < 0.5 else []
        asked = {"role": "user", "content": text}
        return Item(sort, query.domain, form, [*follows, asked], text, query.origin)

    items += [negative("plain", "plain", query, query.text) for query in negatives]
    dressed = rng.sample(list(negatives), min(len(negatives), max(200, len(rows))))
    forms = [*FITTED, AFTER]
    for number, query in enumerate(dressed):
        form = forms[number % len(forms)]
        if form == AFTER:
            asked = {"role": "user", "content": query.text}
            row = rng.choice(rows)
            messages = [*row.messages, asked]
            items.append(Item("dressed", query.domain, form, messages, query.text, row.origin))
        else:
            items.append(negative("dressed", form, query, wardrobe.dress(form, query.text, rng)))
    return items
