"""Tokenised conversations, and how they become one padded batch. Knows roles; does not know models
or training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .roles import Role


@dataclass(frozen=True)
class Example:
    """A tokenised conversation: ids and one role per token."""

    input_ids: list[int]
    roles: list[Role]
    origin: str

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def response_tokens(self) -> int:
        return self.roles.count(Role.RESPONSE)


Batch = dict[str, Tensor]
# A training row and its extra retain rows (flag: is it a retain row).
Bundle = list[tuple[Example, bool]]


def collate(bundles: Sequence[Bundle], pad_id: int, side: str = "right") -> Batch:
    """Pads rows into one batch.

    Returns input_ids, attention_mask, position_ids, roles and labels [B, T] (labels: -100 except
    response tokens of training rows) and retain [B].
    """
    flat = [item for bundle in bundles for item in bundle]
    width = max(len(example) for example, _ in flat)
    shape = (len(flat), width)
    ids = torch.full(shape, pad_id)
    roles = torch.full(shape, int(Role.PAD))
    for row, (example, _) in enumerate(flat):
        place = slice(0, len(example)) if side == "right" else slice(width - len(example), width)
        ids[row, place] = torch.tensor(example.input_ids)
        roles[row, place] = torch.tensor([int(role) for role in example.roles])
    retain = torch.tensor([is_retain for _, is_retain in flat])
    mask = roles != Role.PAD
    labels = torch.where((roles == Role.RESPONSE) & ~retain[:, None], ids, -100)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0),
        "roles": roles,
        "labels": labels,
        "retain": retain,
    }


def prefix_of(batch: Batch, row: int) -> tuple[int, ...]:
    """Token ids of a row's prefix."""
    return tuple(batch["input_ids"][row][batch["roles"][row] == Role.PREFIX].tolist())
