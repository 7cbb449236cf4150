"""A scope: a linear probe on the reference's own hidden states says whether a request is of the
training domain, and an adapter with a gate acts only then.

    z = mean over the tokens of the last user turn's content of the residual stream after each of
        `layers`; score = sum over layers of weight . z, plus bias; open = score > threshold.
    y = W x + open (alpha / r) B A x

One decision holds for a whole row: prompt and answer, as if a router had sent the request to the
reference or to the adapter. Two realisations give the same decisions. If the adapter is on layers
above the deepest of `layers` alone, the states there are the reference's anyway, and one forward
decides and goes on. Otherwise the reference runs over the prompts up to that layer first.

Does not know defenses or training. Shapes: B rows, T tokens, D hidden size.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

from ..errors import DataError, DefenseError, ModelError, first_line
from ..util.files import write_whole
from ..util.strict_json import check_shape, read_record
from .checked import SCOPE_FILE, SCOPED
from .layers import cache_in, causal_lm, decoder_layers
from .losses import find_head
from .turn import UserTurn

_TENSORS = "scope.safetensors"
_AGAIN = "make it again with `ringfence scope`"


@dataclass(frozen=True)
class Probe:
    """Which requests are inside, as a linear probe.

    Attributes:
        weights: [D] by layer (from 1), float32.
        bias, threshold: a request with a score above the threshold is inside.
        turn: where a user's content is in token ids.
    """

    weights: dict[int, Tensor]
    bias: float
    threshold: float
    turn: UserTurn

    @property
    def layers(self) -> list[int]:
        return sorted(self.weights)

    def scores(self, means: dict[int, Tensor]) -> Tensor:
        """Scores [B] from mean states [B, D] by layer."""
        parts = [mean.float() @ self.weights[at].to(mean.device) for at, mean in means.items()]
        return torch.stack(parts).sum(0) + self.bias

    def check(self, model: Any) -> None:
        """Raises ModelError if the model has fewer layers, or other states, than it reads."""
        layers = len(decoder_layers(model))
        if self.layers[-1] > layers:
            raise ModelError(
                f"scope: it looks at layer {self.layers[-1]}, but the model has {layers} layers; "
                "it was fitted for another model"
            )
        size = causal_lm(model).config.get_text_config().hidden_size
        if any(len(weight) != size for weight in self.weights.values()):
            raise ModelError(
                f"scope: it reads states of {len(self.weights[self.layers[0]])} numbers, but the "
                f"model's have {size}; it was fitted for another model"
            )

    def attach(self, model: Any) -> "Gate":
        """From now on the LoRA adapters of `model` (a peft model) act only inside the scope.

        Works with padding on either side, caches, and rows packed into one as transformers does
        it (see `Prefix.attach`).

        Raises:
            DefenseError: the model has no LoRA layer.
        """
        return Gate(self, model)

    def save(self, folder: Path, about: dict[str, Any], router: bool = False) -> None:
        """Writes it next to a saved adapter. Unless it is for a `router`, which decides before the
        model is asked, plain peft refuses the adapter by name from now on."""
        save_file({str(at): w.contiguous() for at, w in self.weights.items()}, folder / _TENSORS)
        record = _Record(
            bias=self.bias,
            threshold=self.threshold,
            header=self.turn.header,
            gap=self.turn.gap,
            closer=self.turn.closer,
            router=router,
            about=about,
        )
        write_whole(folder / SCOPE_FILE, record.model_dump_json(indent=1))
        file = folder / "adapter_config.json"
        if not router and file.is_file():
            config = read_record(file, "save the adapter again")
            write_whole(file, json.dumps(config | {"peft_type": SCOPED}, indent=2))


class _Record(BaseModel):
    """What scope.json holds."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    bias: float
    threshold: float
    header: list[int] = Field(min_length=1)
    gap: list[int]
    closer: list[int] = Field(min_length=1)
    router: bool
    about: dict[str, Any]


@dataclass(frozen=True)
class SavedScope:
    """A scope as read from a folder.

    Attributes:
        router: the adapter next to it is plain; a router decides.
        about: how it was fitted, and what was found (see `prepare.scope.Fit.record`).
    """

    probe: Probe
    router: bool
    about: dict[str, Any]


def read_scope(folder: str | Path) -> SavedScope | None:
    """The scope that is saved in a folder, or None.

    Raises:
        DataError: it is damaged.
    """
    file, tensors = Path(folder) / SCOPE_FILE, Path(folder) / _TENSORS
    if not file.is_file():
        return None
    record = check_shape(_Record, read_record(file, _AGAIN), str(file), _AGAIN)
    try:
        weights = {int(name): weight.float() for name, weight in load_file(tensors).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{tensors}: cannot be read: {first_line(error)}; {_AGAIN}") from error
    if not weights or min(weights) < 1 or any(not w.isfinite().all() for w in weights.values()):
        raise DataError(f"{tensors}: not the weights of a scope; {_AGAIN}")
    turn = UserTurn(record.header, record.gap, record.closer)
    probe = Probe(weights, record.bias, record.threshold, turn)
    return SavedScope(probe, record.router, record.about)


# ------------------------------------------------------------------ states


@contextmanager
def mean_states(model: Any, layers: list[int], content_BT: Tensor) -> Iterator[dict[int, Tensor]]:
    """Within it, a forward ends after the deepest of `layers`, without an error, and fills the
    dict: mean over the content's tokens of the residual stream after each layer, [B, D],
    float32."""
    found: dict[int, Tensor] = {}
    blocks = decoder_layers(model)

    def hook(at: int) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            found[at] = content_mean(output, content_BT)
            if at == layers[-1]:
                raise _Deep

        return keep

    handles = [blocks[at - 1].register_forward_hook(hook(at)) for at in layers]
    try:
        yield found
    except _Deep:
        pass
    finally:
        for handle in handles:
            handle.remove()


class _Deep(Exception):
    """A forward has come to the deepest layer that is looked at."""


def content_mean(output: Any, content_BT: Tensor) -> Tensor:
    """Mean over each row's content of what a layer gave, [B, D], float32."""
    hidden_BTD = output if isinstance(output, Tensor) else output[0]
    kept_BTD = hidden_BTD.masked_fill(~content_BT[..., None], 0)  # padding may be anything
    return kept_BTD.sum(1, dtype=torch.float32) / content_BT.sum(1, keepdim=True)


# ------------------------------------------------------------------ the gate


class Gate:
    """A scope at work on a model.

    Attributes:
        above: all adapted layers lie above those the scope looks at: one forward decides.
        scores_B, open_B: of the last forward's rows; while tokens are generated, of their prompts.
    """

    def __init__(self, probe: Probe, model: Any) -> None:
        self.probe, self.inner = probe, causal_lm(model)
        self.lora = [module for module in model.modules() if isinstance(module, LoraLayer)]
        if not self.lora:
            raise DefenseError(
                "defenses.scope: the model has no LoRA adapter; a scope needs train.method: lora"
            )
        probe.check(self.inner)
        blocks = decoder_layers(self.inner)
        self.above = first_adapted(self.inner) > probe.layers[-1]
        self.scores_B = torch.zeros(0)
        self.open_B = torch.zeros(0, dtype=torch.bool)
        self._content: Tensor | None = None  # of the forward that is to decide
        self._rows: Tensor | None = None  # packed: the row of each token, [1, T]
        self._is_cut = False  # the last user turn may go on in what comes next
        self._is_open = False  # all rows are
        self._means: dict[int, Tensor] = {}
        self._known: Tensor | None = None  # what the cache's earlier tokens were computed with
        self._keep: Tensor | str | None = _OUTSIDE
        # First, because it runs the model on tokens without a user turn, refused from now on.
        find_head(self.inner)
        self.inner.register_forward_pre_hook(self._before, with_kwargs=True)
        self.inner.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        for at in probe.layers:
            blocks[at - 1].register_forward_hook(self._at_layer(at))
        for layer in self.lora:
            # Of DoRA, which also runs lora_B on other things than tokens.
            magnitudes = getattr(layer, "lora_magnitude_vector", {})
            for name, module in layer.lora_B.items():
                acting = magnitudes[name] if name in magnitudes else module  # noqa: SIM401
                acting.register_forward_hook(self._mask)
        self.inner.ringfence_gate = self  # see `layers.gate_of`

    @property
    def is_on(self) -> bool:
        """Whether adapters are on, so that it decides."""
        return not self.lora[0].disable_adapters

    # -------------------------------------------------------------- hooks

    def _before(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._content = self._rows = self._known = None
        if not self.is_on:
            self._keep = None
            return
        if self.lora[0].merged:
            raise ModelError(
                "scope: the adapter is merged into the weights, so it would act everywhere; unmerge"
                " it, or load the model again"
            )
        self._keep = _UNDECIDED
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        if ids_BT is None:
            raise ModelError("scope: the model needs input_ids: embeddings do not show the turns")
        cache = cache_in(kwargs)
        if cache is not None and cache.get_seq_length() > 0:
            if not isinstance(cache, _Decided):
                raise ModelError("scope: this cache was not filled by the scoped model")
            if cache.is_cut and not (ids_BT[:, 0] == self.probe.turn.closer[0]).all():
                raise ModelError("scope: a user turn came in pieces: give all of it at once")
            if ids_BT.shape[1] == 1 or not self.probe.turn.begins_in(ids_BT):
                self._set(cache.open_B, cache.is_open)
                self._is_cut = False
                return
            if not self.above:
                raise ModelError(
                    "scope: a user turn on top of a cache: give the whole conversation without one"
                )
            self._known = cache.open_B
        attends = kwargs.get("attention_mask")
        self._find(ids_BT, attends, kwargs.get("position_ids"), cache)
        if not self.above:
            self._look_ahead(ids_BT, attends, kwargs.get("position_ids"))

    def _find(self, ids_BT: Tensor, attends: Any, positions: Any, cache: Any) -> None:
        """Finds the content whose states decide."""
        is_packed = attends is None or attends.numel() == 1
        if positions is not None and cache is None and is_packed:
            self._rows = find_packed_sequence_indices(positions)
        if self._rows is not None:
            self._content = self.probe.turn.packed_content(ids_BT, self._rows)
            self._is_cut = False
            return
        real_BT = None
        if isinstance(attends, Tensor) and attends.ndim == 2:
            real_BT = attends[:, -ids_BT.shape[1] :].bool()
        self._content = self.probe.turn.content(ids_BT, real_BT)
        self._is_cut = bool(self._content[:, -1].any())

    def _look_ahead(self, ids_BT: Tensor, attends: Any, positions: Any) -> None:
        """The reference's forward over the prompts, up to the deepest layer looked at."""
        end = ids_BT.shape[1]
        if self._rows is None and self._content is not None:
            end = int(self._content.nonzero()[:, 1].max()) + 1
            self._content = self._content[:, :end]
        inputs = {"input_ids": ids_BT[:, :end]}
        if positions is not None:
            inputs["position_ids"] = positions[..., :end]
        if isinstance(attends, Tensor):
            cut = end if attends.numel() > 1 else 1
            inputs["attention_mask"] = (
                attends[:, :cut] if attends.ndim == 2 else attends[..., :cut, :cut]
            )
        self._keep = None  # no adapter acts
        for layer in self.lora:
            layer._disable_adapters = True
        try:
            with torch.no_grad():
                self.inner.get_decoder()(**inputs, use_cache=False)
        except _Deep:
            pass
        finally:
            for layer in self.lora:
                layer._disable_adapters = False

    def _at_layer(self, at: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if self._content is None:
                return
            if self._rows is None:
                self._means[at] = content_mean(output, self._content)
            else:
                self._means[at] = segment_means(output, self._content, self._rows)
            if at == self.probe.layers[-1]:
                self._decide()
                if not self.above:
                    raise _Deep

        return hook

    def _decide(self) -> None:
        self.scores_B = self.probe.scores(self._means)
        open_B = self.scores_B > self.probe.threshold
        self._means, self._content = {}, None
        if self._known is not None and not torch.equal(open_B, self._known.to(open_B.device)):
            raise ModelError(
                "scope: a new user turn is decided otherwise than the turns in the cache; give the "
                "whole conversation without a cache"
            )
        self._set(open_B, bool(open_B.all()))

    def _set(self, open_B: Tensor, is_open: bool) -> None:
        self.open_B, self._is_open = open_B, is_open
        if is_open:
            self._keep = None
        elif self._rows is None:
            self._keep = open_B[:, None, None]
        else:
            self._keep = open_B[self._rows[0] - self._rows[0, 0]][None, :, None]

    def _mask(self, _module: Any, _args: Any, output: Tensor) -> Tensor:
        if self._keep is None:
            return output
        if isinstance(self._keep, str):
            raise ModelError(f"scope: {self._keep}")
        if output.ndim != 3 or len(output) != len(self._keep):
            raise ModelError(
                "scope: an adapted layer does not get its tokens row by row (as in a mixture of "
                "experts), so a batch of open and closed requests cannot be told apart; ask one at "
                "a time, or use a router"
            )
        return output.masked_fill(~self._keep, 0)

    def _after(self, _module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        decided = not isinstance(self._keep, str) and self.is_on
        self._keep, self._content = _OUTSIDE, None
        if not decided or output is None:
            return
        filled = cache_in(kwargs) or (cache_in(output) if isinstance(output, dict) else None)
        if filled is not None:
            if not isinstance(filled, _Decided):
                filled.__class__ = _decided(filled.__class__)
            filled.open_B, filled.is_open = self.open_B, self._is_open
            filled.is_cut = self._is_cut


_OUTSIDE = "the adapter was run outside of its model's forward, where nothing is decided"
_UNDECIDED = "an adapted layer came before the decision"


def segment_means(output: Any, content_1T: Tensor, row_1T: Tensor) -> Tensor:
    """Mean over the content of each packed row, [rows, D]."""
    hidden_1TD = output if isinstance(output, Tensor) else output[0]
    row_T = row_1T[0] - row_1T[0, 0]
    sums = hidden_1TD.new_zeros(int(row_T[-1]) + 1, hidden_1TD.shape[2], dtype=torch.float32)
    sums.index_add_(0, row_T[content_1T[0]], hidden_1TD[content_1T].float())
    return sums / torch.bincount(row_T[content_1T[0]])[:, None]


class _Decided:
    """Mixed into the class of a cache: what is open follows its rows."""

    open_B: Tensor
    is_open: bool
    is_cut: bool

    def _choose(self, open_B: Tensor) -> None:
        self.open_B, self.is_open = open_B, bool(open_B.all())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._choose(self.open_B[beam_idx.to(self.open_B.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._choose(self.open_B[indices.to(self.open_B.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._choose(self.open_B.repeat_interleave(repeats))


@cached
def _decided(kind: Any) -> Any:
    return type(kind.__name__, (_Decided, kind), {})


def first_adapted(model: Any) -> int:
    """The first decoder layer (from 1) with an adapter."""
    blocks = decoder_layers(model)
    adapted = (
        at
        for at, block in enumerate(blocks, 1)
        if any(isinstance(module, LoraLayer) for module in block.modules())
    )
    return next(adapted, len(blocks) + 1)
