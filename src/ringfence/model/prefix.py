"""A frozen prefix: the adapter acts only after the first user turn's header, so the prefix keeps
the reference's keys and values to the bit, in training and in use. And a stored prefix: a model
without an adapter reads the reference's keys and values at its prefix from a file.

The end of the prefix is found in the token ids themselves, by a search for the *header*: the
template text that always comes right before the first user content. So a model with a frozen prefix
works anywhere a transformers model does, without roles. Does not know defenses or training.

Shapes: B rows, T tokens, P prefix tokens.
"""

import json
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.masking_utils import find_packed_sequence_indices

from ..errors import ChatError, DataError, DefenseError, ModelError, first_line
from ..text.chat import Chat
from ..text.roles import Messages
from ..util.files import write_whole
from ..util.strict_json import check_shape, read_record
from .checked import FROZEN, FROZEN_FILE
from .interventions import patched_kv
from .layers import cache_in, causal_lm
from .losses import find_head
from .taps import CommonPrefix, compute_prefix

Until = Literal["query", "header"]
_AGAIN = "copy it again from where the model is from"
_STORED, _STORED_KV = "reference_prefix.json", "reference_prefix.safetensors"


@dataclass(frozen=True)
class Prefix:
    """What is frozen: all tokens before the first user content, or (`until: header`) only those
    before the header.

    header: token ids that come right before the first user content, whatever the system prompt.
    """

    header: list[int]
    until: Until = "query"

    def lengths(self, ids_BT: Tensor) -> Tensor:
        """Number of frozen tokens of each row [B], left padding included.

        Raises:
            ModelError: a row has no header, so it was not made with the chat template.
        """
        size = len(self.header)
        if ids_BT.shape[1] < size:
            raise ModelError(
                f"frozen prefix: the prompt is shorter than the header of a user turn ({size} "
                "tokens)"
            )
        matches = (ids_BT.unfold(1, size, 1) == ids_BT.new_tensor(self.header)).all(-1)
        if not matches.any(1).all():
            row = int((~matches.any(1)).nonzero()[0])
            raise ModelError(
                f"frozen prefix: row {row} of the prompts has no header of a user turn (token ids "
                f"{self.header}); make prompts with the chat template that the adapter was trained "
                "with"
            )
        return matches.int().argmax(1) + (size if self.until == "query" else 0)

    def mask(self, ids_BT: Tensor, row_BT: Tensor | None = None) -> Tensor:
        """Which tokens are frozen, [B, T]. If one row holds several, `row_BT` [1, T] says which one
        each token belongs to.

        Raises:
            ModelError: a row has no header.
        """
        if row_BT is None:
            place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
            return place_T < self.lengths(ids_BT)[:, None]
        rows = ids_BT[0].split(row_BT[0].unique_consecutive(return_counts=True)[1].tolist())
        padded = pad_sequence(list(rows), batch_first=True, padding_value=-1)
        return self.mask(padded)[padded != -1][None]

    def times(self, ids_T: Tensor) -> int:
        """How often the header occurs in a row."""
        matches = ids_T.unfold(0, len(self.header), 1) == ids_T.new_tensor(self.header)
        return int(matches.all(-1).sum())

    def attach(self, model: Any) -> None:
        """From now on the LoRA adapters of `model` (a peft model) are off on the prefix.

        Works with caches (tokens that follow a cached prompt come after the prefix), and with rows
        packed into one as transformers does it: no attention mask (or one of a single number), no
        cache, and positions that restart.

        Raises:
            DefenseError: the model has no LoRA layer.
        """
        keep: list[Tensor | None] = [None]

        def find(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = cache_in(kwargs)
            if layers[0].disable_adapters or (cache is not None and cache.get_seq_length() > 0):
                keep[0] = None
                return
            ids_BT = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            positions, row_BT = kwargs.get("position_ids"), None
            attends = kwargs.get("attention_mask")
            # The layouts of taps mask rows themselves.
            is_packed = attends is None or attends.numel() == 1
            if positions is not None and cache is None and is_packed:
                row_BT = find_packed_sequence_indices(positions)
            keep[0] = ~self.mask(ids_BT, row_BT)[..., None]

        def mask(_module: Any, _args: Any, output: Tensor) -> Tensor:
            return output if keep[0] is None else output * keep[0]

        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        if not layers:
            raise DefenseError(
                "defenses.frozen_prefix: the model has no adapter; it needs train.method: lora"
            )
        # First, because it runs the model on tokens without a header, which are refused from here
        # on.
        find_head(causal_lm(model))
        causal_lm(model).register_forward_pre_hook(find, with_kwargs=True)
        for layer in layers:
            for lora_b in layer.lora_B.values():
                lora_b.register_forward_hook(mask)

    def save(self, folder: Path) -> None:
        """Marks a saved adapter. With `until: header` it becomes an activated LoRA, which plain
        peft honours; otherwise plain peft refuses it by name."""
        file = folder / "adapter_config.json"
        config = read_record(file, "save the adapter again")
        # In plain peft an activated LoRA without a task would act everywhere.
        activated = {"alora_invocation_tokens": self.header, "task_type": "CAUSAL_LM"}
        config |= activated if self.until == "header" else {"peft_type": FROZEN}
        write_whole(file, json.dumps(config, indent=2))
        write_whole(folder / FROZEN_FILE, json.dumps(asdict(self)))


def read_frozen_prefix(folder: str) -> Prefix | None:
    """The frozen prefix of a saved adapter, or None."""
    file = Path(folder) / FROZEN_FILE
    if not file.is_file():
        return None
    found: Prefix = check_shape(Prefix, read_record(file, _AGAIN), str(file), _AGAIN)
    return found


def plain_lora_config(config: dict[str, Any]) -> LoraConfig:
    """An adapter's config without the marks of `save`."""
    return LoraConfig(**config | {"peft_type": "LORA", "alora_invocation_tokens": None})


@dataclass(frozen=True)
class StoredPrefix:
    """The reference's keys and values on known prefixes, for a model whose weights were all tuned.

    Attributes:
        frozen: where a prompt's prefix ends.
        kv: keys and values [P, heads * size] of each layer, by a prefix's token ids [P].
        systems: the system prompts of those prefixes, for messages; None = what the template writes
            without one.
    """

    frozen: Prefix
    kv: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]]
    systems: list[str | None]

    def attach(self, model: Any) -> None:
        """From now on attention reads the stored keys and values at the prefix of every prompt.
        They are put into the cache, too, so generated tokens read them as well. A cache that the
        model gave is used unchanged.

        A prompt whose prefix is not stored raises ModelError, and so do left-padded rows whose
        positions do not start at their first token (`generate` takes care of that).
        """
        inner = causal_lm(model)
        find_head(inner)  # as in `Prefix.attach`
        forward = type(inner).forward

        @wraps(forward)
        def patched(module: Any, *args: Any, **kwargs: Any) -> Any:
            cache = cache_in(kwargs)
            if cache is not None and cache.get_seq_length() > 0:
                return forward(module, *args, **kwargs)
            if cache is not None and type(cache) is not DynamicCache:
                raise ModelError(_NO_CACHE.format(type(cache).__name__))
            ids_BT = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            mask_BT, kv = self._prefixes(
                ids_BT, kwargs.get("attention_mask"), kwargs.get("position_ids")
            )
            with patched_kv(module, kv, mask_BT):
                output = forward(module, *args, **kwargs)
            filled = cache_in(output) if cache is None else cache
            if filled is not None:
                _put_into_cache(filled, kv, mask_BT)
            return output

        # Bound, so that a copy of the model runs the copy.
        inner.forward = MethodType(patched, inner)

    def _prefixes(
        self, ids_BT: Tensor, attends: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Mask [B, T] of the prefixes, and their tokens' keys and values, row by row."""
        starts = [0] * len(ids_BT)
        if attends is not None and attends.ndim == 2:
            starts = attends.int().argmax(1).tolist()
        ends = self.frozen.lengths(ids_BT).tolist()
        mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        found = []
        for row, (start, end) in enumerate(zip(starts, ends)):
            prefix = tuple(ids_BT[row, start:end].tolist())
            if prefix not in self.kv:
                raise ModelError(
                    f"row {row} of the prompts has another system prompt than those that the "
                    f"reference's prefix is stored for: {self.systems} (None = the template's "
                    "own). Patch the model again, with --system"
                )
            first = start
            if positions is not None:
                first = int(positions[min(row, len(positions) - 1), start])
            if first != 0:
                raise ModelError(
                    f"row {row} of the prompts is padded on the left, and its positions do not "
                    "start at 0 with its first token; give position_ids, or pad on the right"
                )
            mask_BT[row, start:end] = True
            found.append(self.kv[prefix])
        layers = [
            [torch.cat(parts).to(ids_BT.device) for parts in zip(*pairs)] for pairs in zip(*found)
        ]
        return mask_BT, [(key, value) for key, value in layers]

    def save(self, folder: Path) -> None:
        """Writes it next to a model."""
        tensors = {
            f"{number}.{layer}.{name}": states.contiguous()
            for number, layers in enumerate(self.kv.values())
            for layer, pair in enumerate(layers)
            for name, states in zip(("keys", "values"), pair)
        }
        about = asdict(self.frozen) | {
            "systems": self.systems,
            "prefixes": [list(ids) for ids in self.kv],
        }
        save_file(tensors, folder / _STORED_KV)
        write_whole(folder / _STORED, json.dumps(about))


def _put_into_cache(cache: Any, kv: list[tuple[Tensor, Tensor]], mask_BT: Tensor) -> None:
    for layer, pair in zip(cache.layers, kv):
        if len(cache.layers) != len(kv) or layer.keys.shape[2] != mask_BT.shape[1]:
            raise ModelError(_NO_CACHE.format(type(layer).__name__))
        for states_BHTE, new_NE in zip((layer.keys, layer.values), pair):
            states_BTHE = states_BHTE.transpose(1, 2)  # a view
            states_BTHE[mask_BT] = new_NE.to(states_BTHE).unflatten(1, states_BTHE.shape[2:])


_NO_CACHE = (
    "{}: a cache that does not hold the prompt token by token cannot take a stored prefix; use "
    "transformers' default cache, and prompts that are shorter than the attention's window"
)


@dataclass(frozen=True)
class _About:
    """What is stored with a prefix's states."""

    header: list[int]
    until: Until
    systems: list[str | None]
    prefixes: Annotated[list[list[int]], Field(min_length=1)]


def read_stored_prefix(folder: str) -> StoredPrefix | None:
    """The reference's prefix that is stored with a model, or None."""
    file = Path(folder) / _STORED
    if not file.is_file():
        return None
    about: _About = check_shape(_About, read_record(file, _AGAIN), str(file), _AGAIN)
    try:
        tensors = load_file(Path(folder) / _STORED_KV)
        layers = len(tensors) // 2 // len(about.prefixes)
        kv = {
            tuple(ids): [
                (tensors[f"{number}.{at}.keys"], tensors[f"{number}.{at}.values"])
                for at in range(layers)
            ]
            for number, ids in enumerate(about.prefixes)
        }
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(
            f"{Path(folder) / _STORED_KV}: not the states of {file}: {first_line(error)}"
        ) from error
    return StoredPrefix(Prefix(about.header, about.until), kv, about.systems)


def find_header(chat: Chat) -> list[int]:
    """Token ids right before the first user content under every system prompt.

    Raises:
        DefenseError: the template has no such tokens.
    """
    user: Messages = [{"role": "user", "content": "Hello"}]
    prefixes = []
    for system in (None, "Be brief.", "You write long poems"):
        before: Messages = [] if system is None else [{"role": "system", "content": system}]
        try:
            encoded = chat.encode([*before, *user], generation=True)
        except ChatError:  # a template may refuse system prompts
            continue
        prefixes.append(encoded.input_ids[: encoded.prefix_length][::-1])
    common = 0
    while all(len(p) > common for p in prefixes) and len({p[common] for p in prefixes}) == 1:
        common += 1
    if not common:
        raise DefenseError(
            "defenses.frozen_prefix: the chat template puts no fixed tokens before a user's content"
        )
    return prefixes[0][:common][::-1]


def reference_prefix(model: Any, ids_P: Tensor, layers: tuple[int, ...] = ()) -> CommonPrefix:
    """A prefix as the reference (`model` with its adapter off) computes it."""
    with torch.no_grad(), model.disable_adapter():
        return compute_prefix(model, ids_P, layers)
