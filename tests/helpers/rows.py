"""Rows with hand-made roles, batches of them, and conversations."""

import random
from collections.abc import Sequence

from torch import Tensor

from helpers.models import PAD, VOCABULARY
from ringfence.text.batch import Example, collate
from ringfence.text.roles import Messages, Role

Items = list[tuple[Example, bool]]
PREFIX_A, PREFIX_B = [3, 4, 5, 6, 7], [3, 9, 8]


def example(prefix: Sequence[int], lengths: Sequence[int], seed: int) -> Example:
    """Prefix, then turns of query, two tokens of postfix, response; `lengths` = query, response,
    query, ..."""
    rng = random.Random(seed)
    ids, roles = list(prefix), [Role.PREFIX] * len(prefix)
    for turn, (query, response) in enumerate(zip(lengths[::2], lengths[1::2])):
        if turn:
            ids += [12, 13]
            roles += [Role.TEMPLATE] * 2
        ids += [rng.randrange(20, VOCABULARY) for _ in range(query)] + [10, 11]
        ids += [rng.randrange(20, VOCABULARY) for _ in range(response)]
        roles += [Role.QUERY] * query + [Role.POSTFIX] * 2 + [Role.RESPONSE] * response
    return Example(ids, roles, f"test:{seed}")


def mixed_items() -> Items:
    """Rows of unlike lengths, two prefixes, several turns, and retain rows before and between the
    training rows."""
    return [
        (example(PREFIX_A, [3, 4], 100), True),
        (example(PREFIX_A, [4, 5], 1), False),
        (example(PREFIX_B, [2, 7], 2), False),
        (example(PREFIX_B, [6, 3], 101), True),
        (example(PREFIX_A, [7, 2], 3), False),
        (example(PREFIX_A, [2, 3, 3, 4], 4), False),
    ]


def training_rows(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return [
        example(
            rng.choice([PREFIX_A, PREFIX_B]),
            [rng.randint(1, 6), rng.randint(1, 6)],
            1000 * seed + at,
        )
        for at in range(count)
    ]


def batch_of(items: Items, side: str = "right") -> dict[str, Tensor]:
    return collate([[item] for item in items], PAD, side)


def messages(question: str, system: str | None = None) -> Messages:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}]
