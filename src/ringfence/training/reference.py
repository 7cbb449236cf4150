"""The reference: the model before this fine-tuning.

For LoRA it is the same weights with the adapter off, so it costs no memory; if an adapter is
trained further, a frozen copy of that adapter; for full fine-tuning, a frozen copy of the model.
With a cache on disk, its states are computed before training, and no copy of the model is kept.
Does not know defenses; it is asked for taps.
"""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DefenseError, RecipeError
from ..model.layers import causal_lm
from ..model.losses import Head, TopK, find_head, top_k
from ..model.sharding import is_sharded, reshard
from ..model.taps import Layout, Needs, Taps, forward, prefix_kv
from ..text.batch import Batch, prefix_of
from ..text.roles import Role
from .ranks import largest
from .reference_cache import ReferenceCache, Wanted

PREFIXES_KEPT = 64
ADAPTER = "reference"  # name of the frozen copy in the peft model


class Reference:
    """Gives taps of the reference, computed in a layout (see taps). Make it before training changes
    a full-weight model. If taps will be requested under autocast, `autocast` is its type: a copy's
    linear layers are cast to it.

    With a `cache`, `fill` comes before training too: from then on, final hidden states (or the most
    probable next tokens) are read from it, and a full-weight model is released.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout = "padded",
        cache: ReferenceCache | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.layout = layout
        self._adapter_model = model if hasattr(model, "disable_adapter") else None
        copied = self._adapter_model is None and cache is None
        self.model = copy.deepcopy(model).eval().requires_grad_(False) if copied else model
        self.head = _without_adapter(find_head(causal_lm(self.model)))
        if copied and autocast:
            _cast_linear(self.model, self.head.module, autocast)
        self.cache = cache
        if cache and cache.kind == "top_k" and cache.k > self.head.vocabulary:
            raise RecipeError(
                f"train.top_k: the model has {self.head.vocabulary} tokens, found {cache.k}"
            )
        if cache and cache.kind == "states" and self.head.trainable:
            frozen = copy.deepcopy(self.head.module).requires_grad_(False)
            self.head = dataclasses.replace(self.head, module=frozen)
        self._prefixes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}

    def fill(self, wanted: Wanted) -> None:
        """Before training: computes what is not cached yet; keeps prefixes' keys and values.

        Raises:
            RecipeError: the disk has too little space, or a fully tuned model has more prefixes
                than are kept.
        """
        assert self.cache is not None
        if self._adapter_model is None and len(wanted.prefixes) > PREFIXES_KEPT:
            raise RecipeError(
                "train.reference_cache: with train.method: full the keys and values of at most "
                f"{PREFIXES_KEPT} prefixes are kept, found {len(wanted.prefixes)} system prompts; "
                "set it to none, or leave defenses.treft out"
            )
        self.cache.fill(wanted.rows, self._cacheable)
        for ids in sorted(wanted.prefixes)[:PREFIXES_KEPT]:
            self._prefix(ids)
        if self._adapter_model is None:
            self.model = None

    def _cacheable(self, batch: Batch, mask_BT: Tensor) -> tuple[Tensor, ...]:
        assert self.cache is not None
        device = self.model.device
        batch, mask_BT = {name: t.to(device) for name, t in batch.items()}, mask_BT.to(device)
        with self.active() as model:
            taps = forward(model, self.head, batch, Needs(hidden_BT=mask_BT))
            hidden_ND = taps.hidden_BTD[mask_BT]
        if self.cache.kind == "states":
            return (hidden_ND,)
        with torch.autocast(device.type, enabled=False):  # as losses make logits
            found = top_k(self.head, hidden_ND, self.cache.k)
        return found.token_ids_NK.int(), found.logprobs_NK

    def shard(self, accelerator: Any) -> None:
        """Shards a frozen copy as accelerate shards the student (an adapter needs no copy)."""
        if not self._adapter_model and self.model is not None:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            self.model = fsdp2_prepare_model(accelerator, self.model)

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The reference model, in evaluation mode and without gradient."""
        if self.model is None:
            raise DefenseError(
                "train.reference_cache: something is asked of the reference that is not cached"
            )
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
            reshard(model)
            model.set_adapter(trained)
        else:
            with model.disable_adapter():
                yield
                # Else peft would mark gathered weights as trained, not those that are kept.
                reshard(model)

    def taps(self, batch: Batch, needs: Needs) -> Taps:
        """Taps laid out as the student's (hidden states are zero on rows without needs).

        Prefix keys and values depend on the prefix alone (attention is causal), so they come from
        memory; the last 64 distinct prefixes are kept. Hidden states come from the cache, if there
        is one. A forward is made if neither is enough. With a sharded model every rank must ask,
        even if it needs nothing.
        """
        rows_B = needs.rows_B()
        if is_sharded(self.model):
            self._keep_step(batch, needs)
        if rows_B is None:
            return Taps(self.head, torch.empty(0), needs)
        if self._at_hand(batch, needs):
            return self._without_forward(batch, needs)
        part = {name: tensor[rows_B] for name, tensor in batch.items()}
        with self.active() as model:
            taps = forward(model, self.head, part, needs.of_rows(rows_B), layout=self.layout)
        hidden_BTD = taps.hidden_BTD.new_zeros(*batch["input_ids"].shape, taps.hidden_BTD.shape[-1])
        hidden_BTD[rows_B] = taps.hidden_BTD
        return dataclasses.replace(taps, hidden_BTD=hidden_BTD, needs=needs)

    def _keep_step(self, batch: Batch, needs: Needs) -> None:
        """All ranks must run a sharded model equally often: catches up with other ranks' runs."""
        own = int(needs.rows_B() is not None)
        if own and self._at_hand(batch, needs):
            own = 0 if needs.kv_BT is None else len(self._new_prefixes(batch, needs.kv_BT))
        row = {name: tensor[:1] for name, tensor in batch.items()}
        for _ in range(largest(own, row["input_ids"].device) - own):
            with self.active() as model:
                forward(model, self.head, row)

    def _new_prefixes(self, batch: Batch, mask_BT: Tensor) -> set[tuple[int, ...]]:
        rows = mask_BT.any(1).nonzero()[:, 0].tolist()
        return {prefix_of(batch, row) for row in rows} - self._prefixes.keys()

    def _at_hand(self, batch: Batch, needs: Needs) -> bool:
        if _any(needs.states_BT) or (_any(needs.hidden_BT) and self.cache is None):
            return False
        return needs.kv_BT is None or bool((batch["roles"][needs.kv_BT] == Role.PREFIX).all())

    def _without_forward(self, batch: Batch, needs: Needs) -> Taps:
        taps = Taps(self.head, torch.empty(0), needs)
        if needs.kv_BT is not None:
            taps.kv = self._prefix_kv(batch, needs.kv_BT)
        if self.cache is None or needs.hidden_BT is None or not _any(needs.hidden_BT):
            return taps
        found = self.cache.read(batch, needs.hidden_BT)
        if self.cache.kind == "top_k":
            taps.top_k = TopK(found[0].long(), found[1])
        else:
            taps.hidden_BTD = found[0].new_zeros(*needs.hidden_BT.shape, found[0].shape[-1])
            taps.hidden_BTD[needs.hidden_BT] = found[0]
        return taps

    def _prefix_kv(self, batch: Batch, mask_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = []
        for row in mask_BT.any(1).nonzero()[:, 0].tolist():
            kv = self._prefix(prefix_of(batch, row))
            chosen = mask_BT[row][batch["roles"][row] == Role.PREFIX]
            rows.append([(k[chosen], v[chosen]) for k, v in kv])
        while len(self._prefixes) > PREFIXES_KEPT:
            self._prefixes.pop(next(iter(self._prefixes)))
        return [
            (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
            for layer in zip(*rows)
        ]

    def _prefix(self, ids: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        if ids not in self._prefixes:
            with self.active() as model:
                self._prefixes[ids] = prefix_kv(model, torch.tensor(ids, device=model.device))
        return self._prefixes[ids]


def _cast_linear(model: Any, head: nn.Module, dtype: torch.dtype) -> None:
    """Does autocast's work of every forward once; not to the head, which losses use without it."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.to(dtype)


def _any(mask_BT: Tensor | None) -> bool:
    return mask_BT is not None and bool(mask_BT.any())


def _without_adapter(head: Head) -> Head:
    """The head's original weights, if it is adapted: it is used when the adapter is on again."""
    module: Any = getattr(head.module, "original_module", head.module)
    return dataclasses.replace(
        head, module=module.get_base_layer() if hasattr(module, "get_base_layer") else module
    )
