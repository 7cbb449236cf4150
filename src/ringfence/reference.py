"""The reference: the aligned model before this fine-tune.

For LoRA it is the same weights with the adapter off, so it costs no memory; where an adapter is trained further, a
frozen copy of that adapter; for full fine-tuning a frozen copy of the model. Does not know defenses; it is asked for
taps.
"""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from .batch import Batch
from .chat import Role
from .losses import Head, find_head
from .taps import Layout, Needs, Taps, causal_lm, forward, prefix_kv

PREFIXES_KEPT = 64
ADAPTER = "reference"  # name of the frozen copy in the peft model


class Reference:
    """Gives taps of the aligned model, computed in a layout (see taps). Make it before training changes a full-weight
    model."""

    def __init__(self, model: Any, layout: Layout = "padded") -> None:
        self.layout = layout
        self._adapter_model = model if hasattr(model, "disable_adapter") else None
        self.model = model if self._adapter_model else copy.deepcopy(model).eval().requires_grad_(False)
        self.head = _without_adapter(find_head(causal_lm(self.model)))
        self._prefixes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The reference model, in evaluation mode and without gradient."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self._adapter_off():
            yield self.model
        self.model.train(was_training)

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        model = self._adapter_model
        if model is None:
            yield
        elif ADAPTER in model.peft_config:
            trained = model.active_adapter
            model.set_adapter(ADAPTER, inference_mode=True)
            yield
            model.set_adapter(trained)
        else:
            with model.disable_adapter():
                yield

    def taps(self, batch: Batch, needs: Needs) -> Taps:
        """Taps laid out as the student's (hidden states are zero on rows where nothing is wanted).

        Prefix keys and values depend on the prefix alone (attention is causal): where nothing else is asked for, they
        come from memory; the last 64 distinct prefixes are kept.
        """
        rows_B = needs.rows_B()
        if rows_B is None:
            return Taps(self.head, torch.empty(0), needs)
        if self._from_memory(batch, needs):
            return Taps(self.head, torch.empty(0), needs, self._prefix_kv(batch, cast(Tensor, needs.kv_BT)))
        part = {name: tensor[rows_B] for name, tensor in batch.items()}
        with self.active() as model:
            taps = forward(model, self.head, part, needs.of_rows(rows_B), layout=self.layout)
        hidden_BTD = taps.hidden_BTD.new_zeros(*batch["input_ids"].shape, taps.hidden_BTD.shape[-1])
        hidden_BTD[rows_B] = taps.hidden_BTD
        return dataclasses.replace(taps, hidden_BTD=hidden_BTD, needs=needs)

    @staticmethod
    def _from_memory(batch: Batch, needs: Needs) -> bool:
        if needs.kv_BT is None or any(mask is not None and mask.any() for mask in (needs.hidden_BT, needs.states_BT)):
            return False
        return bool((batch["roles"][needs.kv_BT] == Role.PREFIX).all())

    def _prefix_kv(self, batch: Batch, mask_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = []
        for row in mask_BT.any(1).nonzero()[:, 0].tolist():
            ids = batch["input_ids"][row][batch["roles"][row] == Role.PREFIX]
            key = tuple(ids.tolist())
            if key not in self._prefixes:
                if len(self._prefixes) == PREFIXES_KEPT:
                    self._prefixes.pop(next(iter(self._prefixes)))
                with self.active() as model:
                    self._prefixes[key] = prefix_kv(model, ids)
            chosen = mask_BT[row][batch["roles"][row] == Role.PREFIX]
            rows.append([(k[chosen], v[chosen]) for k, v in self._prefixes[key]])
        return [(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in zip(*rows)]


def _without_adapter(head: Head) -> Head:
    """The head's original weights where the head itself is adapted: it is used when the adapter is on again."""
    module: Any = getattr(head.module, "original_module", head.module)
    return dataclasses.replace(head, module=module.get_base_layer() if hasattr(module, "get_base_layer") else module)
