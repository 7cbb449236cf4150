"""A model's weights in safetensors files, read by name without the model.

Does not know what they are read for.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError
from ..util.hub import fetch
from .checked import INDEX, SINGLE, read_adapter_config, read_index
from .default import resolve

_DTYPES = ("F32", "F16", "BF16", "F64")


class Checkpoint:
    """A model's weights in safetensors files, read by name, one at a time.

    Args:
        model: `default`, a local folder or a hub id; only weight files are fetched from the hub,
            when they are read.

    Raises:
        ModelError: no safetensors, an index or file that cannot be read, or an adapter instead of a
            model.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        source = resolve(model)
        folder = Path(source)
        if read_adapter_config(source):
            raise ModelError(
                f"{model}: is an adapter; merge it into its base first, or name the whole model"
            )
        if folder.is_file() or (not folder.exists() and source.startswith((".", "/", "~"))):
            raise ModelError(
                f"{model}: no such folder (accepted: 'default', a local folder, a hub id)"
            )
        self._find: Callable[[str], Path | None] = (
            folder.joinpath if folder.is_dir() else partial(fetch, source)
        )
        self._file_of = self._files()

    def _files(self) -> dict[str, str]:
        """File of each weight."""
        index = self._find(INDEX)
        if index and index.is_file():
            return read_index(index)
        with self._open(SINGLE) as file:
            return dict.fromkeys(file.keys(), SINGLE)

    def _open(self, file: str) -> Any:
        path = self._find(file)
        if not path or not path.is_file():
            raise ModelError(
                f"{self.model}: no {file} (accepted: {SINGLE}, or {INDEX} with the files it names)"
            )
        try:
            return safe_open(path, "pt")
        except SafetensorError as error:
            raise ModelError(f"{path}: not a safetensors file: {error}") from error

    def _key(self, name: str) -> str:
        """The weight's own name, or the name without its first part, as in checkpoints of headless
        models."""
        for key in (name, name.partition(".")[2]):
            if key in self._file_of:
                return key
        raise ModelError(
            f"{self.model}: no weight {name!r} in it, so it is another kind of model; it holds "
            f"{', '.join(sorted(self._file_of)[:3])} ... ({len(self._file_of)} in all)"
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, read from the file's header.

        Raises:
            ModelError: no such weight, or it is not of floating point (quantised).
        """
        view = self._slice(name)
        if view.get_dtype() not in _DTYPES:
            raise ModelError(
                f"{self.model}: {name} is {view.get_dtype()}, a quantised weight (accepted: "
                f"{', '.join(_DTYPES)})"
            )
        return tuple(view.get_shape())

    def first_rows(self, name: str) -> Tensor:
        """The first eight rows of a weight."""
        return self._slice(name)[:8]

    def read(self, name: str) -> Tensor:
        """A whole weight, as stored."""
        key = self._key(name)
        with self._open(self._file_of[key]) as file:
            return file.get_tensor(key)

    def _slice(self, name: str) -> Any:
        key = self._key(name)
        with self._open(self._file_of[key]) as file:
            if key not in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                raise ModelError(
                    f"{self.model}: {self._file_of[key]} lacks {key}, which its index places there"
                )
            return file.get_slice(key)
