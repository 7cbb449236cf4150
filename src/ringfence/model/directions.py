"""Directions in the residual stream, layer by layer, and their file.

One safetensors file: `directions` [L, K, D] and `norms` [L], float32, where row l-1 belongs to the
residual stream after layer l; metadata `trait`, `model`, `positive` and `negative` (the number of
answers on each side). Does not know where directions come from, nor what they are used for.

Shapes: L layers, K directions a layer, D hidden size, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DataError, DefenseError, ModelError
from .layers import causal_lm


@dataclass(frozen=True)
class Directions:
    """K directions for each layer (not of unit length), and what is known of their origin.

    Attributes:
        directions_LKD: row l-1 belongs to the residual stream after layer l.
        norms_L: mean length of a token's residual stream after each layer: a possible unit of
            steps.
        trait: what the directions point to.
        model: the model they were taken from.
        positive, negative: the number of answers on each side.
    """

    directions_LKD: Tensor
    norms_L: Tensor
    trait: str
    model: str
    positive: int
    negative: int

    @property
    def layers(self) -> int:
        return self.directions_LKD.shape[0]

    def chosen(self, defense: str, layers: Sequence[int] | None) -> list[int]:
        """The layers that a defense is configured to work on (None: all), in order.

        Raises:
            DefenseError: one of them is not in the file, or is named twice.
        """
        every = range(1, self.layers + 1)
        chosen = sorted(every if layers is None else layers)
        if len(set(chosen)) < len(chosen) or not set(chosen) <= set(every):
            raise DefenseError(
                f"defenses.{defense}.layers: expected distinct layers from 1 to {self.layers}, "
                f"found {chosen}"
            )
        return chosen

    def basis(self, layer: int) -> Tensor:
        """Orthonormal basis [D, R] of the span of a layer's directions (layers from 1); R < K if
        some are dependent."""
        _, sizes_K, basis_KD = torch.linalg.svd(
            self.directions_LKD[layer - 1].double(), full_matrices=False
        )
        rank = int((sizes_K > 1e-6 * sizes_K[0]).sum())
        return basis_KD[:rank].T.float().contiguous()

    def check(self, model: Any) -> None:
        """Raises ModelError unless the model has the same number of layers, of the same width."""
        config = causal_lm(model).config.get_text_config()
        found = self.directions_LKD.shape[::2]
        wanted = (config.num_hidden_layers, config.hidden_size)
        if found != wanted:
            raise ModelError(
                f"the directions for {self.trait!r} were taken from {self.model} with {found[0]} "
                f"layers of size {found[1]}; this model has {wanted[0]} layers of size {wanted[1]}"
            )

    def save(self, file: Path) -> None:
        tensors = {
            "directions": self.directions_LKD.float().contiguous(),
            "norms": self.norms_L.float().contiguous(),
        }
        counts = {"positive": str(self.positive), "negative": str(self.negative)}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, {"trait": self.trait, "model": self.model, **counts})

    @classmethod
    def load(cls, file: Path) -> "Directions":
        """Reads a file of directions.

        Raises:
            DataError: no such file, not safetensors, a tensor is missing or of a wrong shape, or a
                direction is zero or not finite.
        """
        if not file.is_file():
            raise DataError(
                f"{file}: no such file of directions (`ringfence persona extract` makes one)"
            )
        try:
            with safe_open(file, "pt") as content:
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
                metadata = content.metadata() or {}
        except SafetensorError as error:
            raise DataError(f"{file}: not a safetensors file: {error}") from error
        _check_tensors(file, tensors)
        return cls(
            tensors["directions"].float(),
            tensors["norms"].float(),
            metadata.get("trait", "unknown"),
            metadata.get("model", "an unnamed model"),
            *(_count(file, metadata, side) for side in ("positive", "negative")),
        )


def _count(file: Path, metadata: dict[str, str], side: str) -> int:
    text = metadata.get(side, "0")
    if not text.isdecimal():
        raise DataError(f"{file}: metadata {side!r}: expected a number of answers, found {text!r}")
    return int(text)


def _check_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    directions, norms = tensors.get("directions"), tensors.get("norms")
    if (
        directions is None
        or norms is None
        or directions.ndim != 3
        or norms.shape != directions.shape[:1]
    ):
        raise DataError(
            f"{file}: expected tensors directions [layers, directions, hidden size] and norms "
            f"[layers], found {shapes}"
        )
    if 0 in directions.shape:
        raise DataError(f"{file}: directions has shape {shapes['directions']}: there is none in it")
    if not norms.isfinite().all() or not (norms > 0).all():
        raise DataError(
            f"{file}: norms: expected positive numbers, found "
            f"{[round(n, 3) for n in norms.tolist()]}"
        )
    for layer, lengths_K in enumerate(directions.double().norm(dim=-1), 1):
        if not lengths_K.isfinite().all() or not (lengths_K > 0).all():
            raise DataError(
                f"{file}: layer {layer}: expected directions of a finite length above 0, found "
                f"{lengths_K.tolist()}"
            )
