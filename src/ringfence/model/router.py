"""The decision alone: is a request inside a scope? For a router in front of a server that holds
the reference and the adapter.

Needs only the first layers of the reference, which can be saved apart. Does not know defenses or
training.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DataError
from ..text.chat import Chat
from ..text.roles import Messages
from ..util.journal import digest
from ..util.quiet import quiet_libraries
from .checked import SCOPE_FILE, checked_load
from .files import adapter_base, load_tokenizer
from .layers import causal_lm, decoder_layers
from .loading import load_model
from .scope import SavedScope, mean_states, read_scope

_FIRST = "first_layers"  # folder of a saved router


@dataclass(frozen=True)
class Decision:
    """Whether a request is inside the scope: its score is above the threshold."""

    open: bool
    score: float
    threshold: float


class Router:
    """Decides about conversations.

    Attributes:
        saved: the scope, and what was found when it was fitted.
    """

    def __init__(self, saved: SavedScope, chat: Chat, model: Any) -> None:
        self.saved, self.chat, self.model = saved, chat, model

    @classmethod
    def load(cls, folder: str | Path) -> "Router":
        """From the folder of a scoped adapter, whose base is then loaded, or of a saved router.

        Raises:
            DataError: no scope in the folder, or another chat template than it was fitted with.
        """
        folder = Path(folder)
        saved = read_scope(folder)
        if saved is None:
            raise DataError(f"{folder}: no scope in it (expected {SCOPE_FILE})")
        first = folder / _FIRST
        source = str(first) if first.is_dir() else adapter_base(folder)
        if source is None:
            raise DataError(f"{folder}: neither an adapter with a scope nor a saved router")
        chat = Chat(load_tokenizer(source if first.is_dir() else str(folder)))
        if (known := saved.about.get("template")) and known != digest(chat.template):
            raise DataError(
                f"{folder}: its scope was fitted with another chat template; make it again with "
                "`ringfence scope`"
            )
        model = _load_first(source) if first.is_dir() else cut(load_model(source), saved)
        return cls(saved, chat, model)

    def decide(self, messages: Messages) -> Decision:
        """Decides about a conversation, by its last user turn.

        Raises:
            ChatError: the chat template refuses it.
        """
        ids = torch.tensor([self.chat.encode(messages, generation=True).input_ids])
        ids = ids.to(next(self.model.parameters()).device)
        probe = self.saved.probe
        content = probe.turn.content(ids)
        end = int(content[0].nonzero()[-1]) + 1
        content = content[:, :end]
        with torch.no_grad(), mean_states(self.model, probe.layers, content) as means:
            self.model.get_decoder()(input_ids=ids[:, :end], use_cache=False)
        score = float(probe.scores(means)[0])
        return Decision(score > probe.threshold, score, probe.threshold)

    def save(self, folder: str | Path, scope: str | Path) -> None:
        """Writes what `load` needs, and nothing else: the scope of the folder `scope`, the
        tokenizer, and the reference's first layers."""
        folder = Path(folder)
        if folder.exists():
            raise DataError(f"output: {folder} exists already; name another folder")
        (folder / _FIRST).mkdir(parents=True)
        for file in Path(scope).glob("scope.*"):
            shutil.copy(file, folder)
        causal_lm(self.model).get_decoder().save_pretrained(folder / _FIRST)
        self.chat.save(folder / _FIRST)


def cut(model: Any, saved: SavedScope) -> Any:
    """The model without the layers after the deepest that the scope looks at, and without head."""
    saved.probe.check(model)
    layers, last = decoder_layers(model), saved.probe.layers[-1]
    inner = causal_lm(model)
    decoder, config = inner.get_decoder(), inner.config.get_text_config()
    name = next(name for name, module in decoder.named_modules() if module is layers)
    parent = decoder.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.ModuleList(list(layers)[:last]))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:last]
    config.num_hidden_layers = last
    decoder.config = config
    return inner


@quiet_libraries()
def _load_first(folder: str) -> Any:
    from transformers import AutoModel

    kind = json.loads((Path(folder) / "config.json").read_text("utf-8")).get("dtype", "float32")
    options = {"dtype": getattr(torch, kind), "use_safetensors": True}
    return checked_load(AutoModel.from_pretrained, folder, folder, "model", **options).eval()
