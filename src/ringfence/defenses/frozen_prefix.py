"""Frozen prefix: the prefix keeps the reference's keys and values exactly, in training and in use.
This is TReFT's limit for an infinite weight, without a penalty."""

import random
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ..errors import DefenseError, ModelError
from ..model.layers import causal_lm
from ..model.prefix import Prefix, Until, find_header, reference_prefix
from ..model.taps import CommonPrefix, Needs
from ..text.batch import Batch, Example
from ..text.roles import Role
from .base import TAKES_THE_BASE, Defense, DefenseConfig, Setup, Training


class FrozenPrefix(DefenseConfig):
    """The adapter acts only after the prefix; the prefix is the reference's, computed once."""

    until: Until = Field(
        "query",
        description="query: all tokens before the first user content are frozen; header: only "
        "those before the user turn's header, which plain peft can load too, as an activated LoRA",
    )

    def refuses(self, training: Training) -> str | None:
        if training.method == "full":
            return "frozen_prefix needs train.method: lora; full fine-tuning changes what makes it"
        return f"frozen_prefix {TAKES_THE_BASE}" if training.further else None

    def build(self, setup: Setup) -> "FrozenPrefixDefense":
        defense = FrozenPrefixDefense(Prefix(find_header(setup.chat), self.until))
        defense.check(setup.retain)
        return defense


class FrozenPrefixDefense(Defense):
    name = "frozen_prefix"
    whole_rows = True

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self._computed: dict[Any, CommonPrefix] = {}

    def check(self, examples: list[Example]) -> None:
        """Raises DefenseError if the header does not show where a row's prefix ends."""
        for example in examples:
            ids = torch.tensor([example.input_ids])
            try:
                end = int(self.prefix.lengths(ids)[0])
            except ModelError as error:
                raise DefenseError(f"defenses.frozen_prefix: {example.origin}: {error}") from error
            end += len(self.prefix.header) if self.prefix.until == "header" else 0
            if end != example.roles.count(Role.PREFIX):
                raise DefenseError(
                    f"defenses.frozen_prefix: {example.origin}: the user turn's header is at token "
                    f"{end}, but the prefix has {example.roles.count(Role.PREFIX)} tokens"
                )
            if self.prefix.until == "header" and self.prefix.times(ids[0]) > 1:
                raise DefenseError(
                    f"defenses.frozen_prefix: {example.origin}: several user turns; an activated "
                    "LoRA would act from the last one only: set until: query"
                )

    def change_data(self, examples: list[Example], rng: random.Random) -> list[Example]:
        self.check(examples)
        return examples

    def start(self, model: Any) -> None:
        self.prefix.attach(model)

    def cached_prefix(self, model: Any, batch: Batch, needs: Needs) -> CommonPrefix | None:
        lengths_B = self.prefix.lengths(batch["input_ids"])
        length = int(lengths_B[0])
        ids_BP = batch["input_ids"][:, :length]
        asked = [
            mask for mask in (needs.hidden_BT, needs.kv_BT, needs.states_BT) if mask is not None
        ]
        if (
            causal_lm(model).is_gradient_checkpointing  # it turns caches off
            or length == 0
            or not (ids_BP == ids_BP[0]).all()
            or not batch["attention_mask"][:, 0].all()
            or any(mask[:, :length].any() for mask in asked)
        ):
            return None
        key = (tuple(ids_BP[0].tolist()), needs.layers)
        if key not in self._computed:
            self._computed = {key: reference_prefix(model, ids_BP[0], needs.layers)}
        return self._computed[key]

    def save(self, folder: Path) -> None:
        self.prefix.save(folder)
