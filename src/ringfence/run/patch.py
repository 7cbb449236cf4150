"""Repairs a tuned model without training: its prefix gets the reference's keys and values.

The prefix is the template text before the first user content. A LoRA adapter is copied and marked
as one with a frozen prefix, which acts only after the prefix. A fully tuned model is copied, and
the reference's keys and values at known prefixes are stored next to it. Weights stay as they are.
Measures nothing: whether alignment depends on the prefix differs between models.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ..errors import ChatError, DefenseError, ModelError, RecipeError
from ..evaluate.config import EvaluateConfig
from ..evaluate.measures.pairs import disguises
from ..model.default import resolve
from ..model.files import adapter_base, check_adapter, load_config, load_tokenizer
from ..model.loading import load_model
from ..model.precision import Precision
from ..model.prefix import (
    Prefix,
    StoredPrefix,
    Until,
    find_header,
    read_frozen_prefix,
    read_stored_prefix,
)
from ..model.scope import read_scope
from ..model.taps import prefix_kv
from ..runfolder.names import is_run
from ..text.chat import Chat
from ..text.roles import Messages
from .record import Run

_WEIGHTS = "adapter_model.safetensors"
# Adapters of these kinds change more than B A adds, so they cannot be turned off token by token.
_NOT_PLAIN = ("use_dora", "use_qalora", "use_bdlora", "target_parameters", "layer_replication")
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base's weights


@dataclass(frozen=True)
class Patched:
    """What was written: the folder, the reference whose prefix it has, whether it is an adapter."""

    folder: Path
    reference: str
    is_adapter: bool


def patch(
    source: str | Path,
    output: str | Path,
    *,
    reference: str | None = None,
    until: Until = "query",
    systems: Sequence[str] = (),
    precision: Precision = "auto",
) -> Patched:
    """Writes a copy of a tuned model that has the reference's keys and values at its prefix.

    Args:
        source: a run folder, the folder of a LoRA adapter, or of a model; left as it is.
        output: the new folder, which `load_model` loads; must not exist.
        reference: the model before fine-tuning. Default: the one that the run or the adapter names,
            which for an adapter is the only choice.
        until: `query` = all tokens before the first user content, `header` = those before the user
            turn's header; an adapter is then an activated LoRA, which plain peft loads too.
        systems: for a whole model: system prompts it will be used with, besides the template's
            default and those that `evaluate` uses. Others will be refused. An adapter takes any.
        precision: for a whole model: of the reference, while its keys and values are computed.

    Raises:
        RecipeError: `output` exists, the run is not trained, or an option does not fit the kind of
            model.
        ModelError: no model in the folder, an already patched one, an adapter that cannot be turned
            off token by token, or a reference that does not fit.
        DefenseError: the chat template does not show where a prefix ends.
        ChatError: the chat template refuses a system prompt.
    """
    output = Path(output)
    if output.exists():
        raise RecipeError(f"output: {output} exists already; name another folder")
    folder, of_run = tuned_weights(Path(source))
    if adapter_base(str(folder)):
        return _patch_adapter(folder, output, reference or of_run, until, systems)
    if (folder / "config.json").is_file():
        return _patch_model(folder, output, reference or of_run, until, systems, precision)
    raise ModelError(
        f"{source}: no model in it (accepted: a run folder, an adapter's folder, a model's folder)"
    )


def tuned_weights(source: Path) -> tuple[Path, str | None]:
    """The folder of the tuned weights, and the reference that its recipe names."""
    if is_run(source):
        run = Run(source)
        if not run.weights.is_dir():
            raise RecipeError(f"{source}: no trained model in it; `ringfence train` comes first")
        return run.weights, run.recipe.model
    return source, None


def _header(
    chat: Chat, befores: Sequence[Messages], until: Until
) -> tuple[Prefix, list[tuple[int, ...]]]:
    """Where a prefix ends, and the frozen tokens of the prefix with each of `befores`."""
    frozen = Prefix(find_header(chat), until)
    whole = Prefix(frozen.header)
    found = []
    for before in befores:
        encoded = chat.encode([*before, {"role": "user", "content": "Hello"}], generation=True)
        ids = torch.tensor([encoded.input_ids])
        if int(whole.lengths(ids)) != encoded.prefix_length:
            raise DefenseError(
                f"the user turn's header is at token {int(whole.lengths(ids))}, but the prefix has "
                f"{encoded.prefix_length} tokens: the chat template does not show where a prefix "
                "ends"
            )
        found.append(tuple(encoded.input_ids[: int(frozen.lengths(ids))]))
    return frozen, found


def copy_files(folder: Path, output: Path) -> None:
    output.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file():
            shutil.copy(file, output)


# ------------------------------------------------------------------ an adapter


def _patch_adapter(
    folder: Path, output: Path, reference: str | None, until: Until, systems: Sequence[str]
) -> Patched:
    if systems:
        raise RecipeError(
            f"system: {folder} is an adapter, which takes any system prompt: leave --system out"
        )
    _check_adapter(folder)
    base = str(adapter_base(str(folder)))
    if reference and Path(resolve(reference)).resolve() != Path(resolve(base)).resolve():
        raise ModelError(
            f"{folder}: its adapter is for {base}, so its prefix cannot be that of another "
            f"reference (found {reference}); merge what it was trained on into its base first, or "
            "leave --reference out"
        )
    frozen, _ = _header(Chat(load_tokenizer(str(folder))), [[]], until)
    copy_files(folder, output)
    frozen.save(output)
    return Patched(output, base, True)


def _check_adapter(folder: Path) -> None:
    config = check_adapter(folder)
    if read_frozen_prefix(str(folder)) or config.get("alora_invocation_tokens"):
        raise ModelError(
            f"{folder}: its adapter already acts only after the prefix; there is nothing to patch"
        )
    if read_scope(folder):
        raise ModelError(
            f"{folder}: its adapter has a scope; patch the adapter without it, then make its scope "
            "again with `ringfence scope`"
        )
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder}: expected a LoRA adapter, found {config.get('peft_type')}")
    odd = [name for name in _NOT_PLAIN if config.get(name)]
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        odd.append(f"init_lora_weights {start!r}")
    with safe_open(folder / _WEIGHTS, "pt") as file:
        keys = sorted(file.keys())
    odd += [key for key in keys if not key.endswith((".lora_A.weight", ".lora_B.weight"))][:1]
    if odd:
        raise ModelError(
            f"{folder}: its adapter holds more than LoRA on linear layers ({odd[0]}), which cannot "
            "be turned off token by token; merge it into its base, and patch the whole model"
        )


# ------------------------------------------------------------------ a whole model


def _patch_model(
    folder: Path,
    output: Path,
    reference: str | None,
    until: Until,
    systems: Sequence[str],
    precision: Precision,
) -> Patched:
    if read_stored_prefix(str(folder)):
        raise ModelError(
            f"{folder}: already has a reference's prefix; patch the model that it was made from"
        )
    if not reference:
        raise RecipeError(
            f"reference: {folder} does not name the model that it was tuned from; name it"
        )
    if adapter_base(resolve(reference)):
        raise ModelError(
            f"{reference}: is an adapter; merge it into its base first, or name the whole model"
        )
    chat, tuned_chat = Chat(load_tokenizer(reference)), Chat(load_tokenizer(str(folder)))
    known = _system_prompts(chat, systems)
    befores: list[Messages] = [
        [] if text is None else [{"role": "system", "content": text}] for text in known
    ]
    frozen, prefixes = _header(tuned_chat, befores, until)
    if _header(chat, befores, until) != (frozen, prefixes):
        raise ModelError(
            f"{reference}: its chat template writes other prefixes than that of {folder}: another "
            "model"
        )
    if () in prefixes:
        raise RecipeError(
            f"until: {until}: without a system prompt nothing is before the header; set query"
        )
    _check_shapes(folder, reference)
    model = load_model(reference, precision)
    kv = {}
    for ids in prefixes:
        found = prefix_kv(model, torch.tensor(ids, device=model.device))
        kv[ids] = [(key.cpu(), value.cpu()) for key, value in found]
    layers = model.config.get_text_config().num_hidden_layers
    if any(len(found) != layers for found in kv.values()):
        raise ModelError(
            f"{reference}: not all of its layers attend, so keys and values do not represent its "
            "whole prefix"
        )
    copy_files(folder, output)
    StoredPrefix(frozen, kv, known).save(output)
    return Patched(output, reference, False)


def _system_prompts(chat: Chat, systems: Sequence[str]) -> list[str | None]:
    """None (the template's default), those of `evaluate` that the template takes, and `systems`."""
    asked = [before[0]["content"] for before in disguises(EvaluateConfig()).values()]
    taken: list[str] = []
    for text in asked:
        system = {"role": "system", "content": text}
        try:
            chat.encode([system, {"role": "user", "content": "Hello"}], generation=True)
        except ChatError:
            continue
        taken.append(text)
    return [None, *dict.fromkeys([*taken, *systems])]


def _check_shapes(folder: Path, reference: str) -> None:
    ours, theirs = (load_config(name).get_text_config() for name in (str(folder), reference))
    sizes = ("num_hidden_layers", "hidden_size", "num_key_value_heads", "head_dim")
    for field in ("model_type", *sizes, "rope_parameters"):
        here, there = getattr(ours, field, None), getattr(theirs, field, None)
        if here != there:
            raise ModelError(
                f"{reference}: its {field} is {there}, but that of {folder} is {here}: another "
                "model"
            )
