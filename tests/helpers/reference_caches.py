"""Caches of a tiny reference, and how many rows it had to compute to fill them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from helpers.models import VOCABULARY, tiny, with_lora
from helpers.rows import Items, batch_of
from helpers.trainers import build
from ringfence.defenses import KL, Defense
from ringfence.model.layers import causal_lm
from ringfence.text.roles import Role
from ringfence.training.reference import Reference
from ringfence.training.reference_cache import ReferenceCache, Wanted, rows_of


def made(method: str, architecture: str = "llama", **size: float) -> Any:
    return with_lora(tiny(architecture), **size) if method == "lora" else tiny(architecture)


def cache_in(
    folder: Path, kind: Any = "states", k: int = VOCABULARY, **reference: Any
) -> ReferenceCache:
    return ReferenceCache(kind, {"model": "tiny", **reference}, k, folder)


def wanted_of(defenses: list[Defense], items: Items) -> Wanted:
    """All rows in one step of a stream."""
    batch = batch_of(items)
    needs = [defense.needs(batch) for defense in defenses]
    rows = [
        row
        for need in needs
        if need.hidden_BT is not None
        for row in rows_of(batch, need.hidden_BT)
    ]
    prefixes = {tuple(row.input_ids[: row.roles.count(Role.PREFIX)]) for row, _ in items}
    return Wanted({row.name: row for row in rows}, prefixes)


class Forwards:
    """Counts forwards without gradient of the model that is trained."""

    def __init__(self, model: Any) -> None:
        self.rows, self.number = 0, 0
        causal_lm(model).get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: Any, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            self.number += 1
            self.rows += len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])


def filled(folder: Path, items: Items, method: str = "lora") -> tuple[Reference, int]:
    """A reference with these rows in its cache, and how many rows had to be computed."""
    model = made(method)
    reference = Reference(model, cache=cache_in(folder))
    forwards = Forwards(model)
    asked = wanted_of(build(KL(where="train"), KL()), items)
    missing = len(reference.cache.missing(asked.rows)) if reference.cache else 0
    reference.fill(dataclasses.replace(asked, prefixes=set()))
    assert forwards.rows == missing + (missing > 0)  # one row is computed to know the size
    return reference, missing
