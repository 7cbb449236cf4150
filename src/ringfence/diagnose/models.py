"""The models of a diagnosis: the pre-trained base (if there is one), the reference, tuned models.

One checkpoint is in memory at a time; a tuned model that is an adapter on the reference shares its
weights, so switching between the two costs nothing. Does not know what is measured.
"""

import gc
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from ..model.default import resolve
from ..model.files import adapter_base, load_config, load_tokenizer
from ..model.fingerprint import fingerprint
from ..model.layers import causal_lm
from ..model.loading import load_model
from ..model.precision import Precision, settled
from ..text.chat import Chat, stored_settings
from ..text.roles import ChatSettings

BASE, REFERENCE = "base", "reference"
Source = Any  # a folder or hub id, or a loaded model


class Models:
    """Opens models by name: `base`, `reference`, and each tuned one under the name it was given.

    Args:
        reference: the model before fine-tuning.
        tuned: by name, one or more, in the order of tables and figures.
        base: the pre-trained model before its alignment; None if there is none.
        tokenizer: of all three (the reference's); needed if the reference is a loaded model.

    Raises:
        ModelError: a name is taken, or (on opening) the models do not fit each other.
    """

    def __init__(
        self,
        reference: Source,
        tuned: Mapping[str, Source],
        base: Source | None = None,
        precision: Precision = "auto",
        tokenizer: Any = None,
    ) -> None:
        if not tuned or {BASE, REFERENCE} & set(tuned):
            raise ModelError(
                "expected tuned models with names other than base and reference, found "
                f"{list(tuned)}"
            )
        self.sources: dict[str, Source] = {
            **({BASE: base} if base is not None else {}),
            REFERENCE: reference,
            **tuned,
        }
        self.tuned = list(tuned)
        self.precision = settled(precision)
        self._tokenizer = tokenizer
        self._loaded: tuple[str, Any] | None = None  # source and model

    @property
    def names(self) -> list[str]:
        """base (if there is one), reference, then the tuned models."""
        return list(self.sources)

    @property
    def has_base(self) -> bool:
        return BASE in self.sources

    @cached_property
    def chat(self) -> Chat:
        """The reference's chat template, which is used with all models."""
        return Chat(
            self._tokenizer or load_tokenizer(self.sources[REFERENCE]), settings=self._settings
        )

    @property
    def _settings(self) -> ChatSettings | None:
        """The settings with which the first tuned model was trained."""
        source = self.sources[self.tuned[0]]
        if not isinstance(source, str) or self._tokenizer:
            return None  # the reference's
        is_stored = (Path(source) / "tokenizer_config.json").is_file()
        return stored_settings(load_tokenizer(source)) if is_stored else None

    @property
    def config(self) -> Any:
        """The reference's text config; no weights are read for it."""
        source = self.sources[REFERENCE]
        config = load_config(source) if isinstance(source, str) else causal_lm(source).config
        return config.get_text_config()

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """The model `name`, in evaluation mode, until the context ends; do not keep it. Its
        parameters take no gradient unless the caller requests it."""
        source = self.sources[name]
        if not isinstance(source, str):
            yield source.eval()
            return
        if name == REFERENCE and self._loaded and self._is_adapter_on(source, self._loaded[0]):
            with self._loaded[1].disable_adapter():
                yield self._loaded[1]
        else:
            yield self._load(source)

    def close(self) -> None:
        """Releases what is loaded."""
        self._loaded = None
        gc.collect()  # adapters and their models refer to each other

    def key(self) -> dict[str, str]:
        """Identifies these models: a fingerprint of each (for a loaded one, a digest of its
        weights), and the precision."""
        found = {
            name: fingerprint(source) if isinstance(source, str) else _weights_digest(source)
            for name, source in self.sources.items()
        }
        return found | {"precision": self.precision}

    def _load(self, source: str) -> Any:
        if self._loaded is None or self._loaded[0] != source:
            self.close()
            self._loaded = (source, load_model(source, self.precision).requires_grad_(False))
        return self._loaded[1]

    @staticmethod
    def _is_adapter_on(reference: str, source: str) -> bool:
        """Whether a loaded source is an adapter on the reference."""
        base = adapter_base(resolve(source))
        return base is not None and resolve(base) == resolve(reference)


def _weights_digest(model: Any) -> str:
    total = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().cpu().contiguous().flatten()
        total.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
