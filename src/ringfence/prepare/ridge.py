"""Ridge regression of +1 and -1 on states that are kept on disk, read in blocks: memory does not
grow with the number of rows.

Shapes: N rows, L layers, D hidden size, F features (L * D).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_BLOCK = 1024  # rows read at once
_WIDEST = 2048  # features; more are projected at random


@dataclass(frozen=True)
class Moments:
    """Of the features of some queries of one sort: their number, sum [F] and products [F, F]."""

    sort: str
    count: int
    sum_F: np.ndarray
    products_FF: np.ndarray


class Features:
    """States after some layers as features, read in blocks: scaled, and of many layers' sizes
    projected at random."""

    def __init__(self, states: np.ndarray, places: list[int], seed: int) -> None:
        self.states, self.places = states, places
        size = states.shape[2]
        width = min(size, _WIDEST // len(places))
        rng = np.random.default_rng(seed)
        self.project_DW = (
            None if width == size else rng.standard_normal((size, width)) / np.sqrt(width)
        )
        total: Any = 0.0
        squares: Any = 0.0
        for block in self._blocks(np.arange(len(states))):
            total, squares = total + block.sum(0), squares + (block**2).sum(0)
        self.mean_F: np.ndarray = total / len(states)
        self.scale_F: np.ndarray = np.sqrt(
            np.maximum(squares / len(states) - self.mean_F**2, 1e-12)
        )

    def _blocks(self, at: np.ndarray) -> Iterator[np.ndarray]:
        """Raw features [block, F], float64."""
        for start in range(0, len(at), _BLOCK):
            states_NLD = self.states[at[start : start + _BLOCK]][:, self.places].astype(np.float64)
            if self.project_DW is not None:
                states_NLD = states_NLD @ self.project_DW
            yield states_NLD.reshape(len(states_NLD), -1)

    def moments(self, chosen: np.ndarray, sort: str) -> Moments:
        sums = np.zeros(len(self.mean_F))
        products = np.zeros((len(self.mean_F), len(self.mean_F)))
        for block in self._blocks(np.flatnonzero(chosen)):
            scaled = (block - self.mean_F) / self.scale_F
            sums += scaled.sum(0)
            products += scaled.T @ scaled
        return Moments(sort, int(chosen.sum()), sums, products)

    def fit(
        self, moments: list[Moments], strength: float, shares: Mapping[str, float]
    ) -> tuple[np.ndarray, float]:
        """Ridge regression on +1 and -1, in which each sort of query has its share of the weight,
        however many there are. Weight [F] and bias for raw features."""
        mean_F, target = np.zeros_like(self.mean_F), 0.0
        products_FF = np.zeros((len(mean_F), len(mean_F)))
        against_F = np.zeros_like(mean_F)
        counts = {sort: sum(m.count for m in moments if m.sort == sort) for sort in shares}
        total = sum(share for sort, share in shares.items() if counts[sort])
        for one in moments:
            if not one.count:
                continue
            weight = shares[one.sort] / total / counts[one.sort]
            side = 1.0 if one.sort == "positive" else -1.0
            mean_F += weight * one.sum_F
            products_FF += weight * one.products_FF
            against_F += weight * side * one.sum_F
            target += weight * side * one.count
        covariance_FF = products_FF - np.outer(mean_F, mean_F)
        ridge = strength * covariance_FF.diagonal().mean()
        covariance_FF[np.diag_indices_from(covariance_FF)] += ridge
        scaled_F = np.linalg.solve(covariance_FF, against_F - target * mean_F)
        weight_F = scaled_F / self.scale_F
        return weight_F, float(target - scaled_F @ mean_F - weight_F @ self.mean_F)

    def scores(self, at: np.ndarray, weight_F: np.ndarray, bias: float) -> np.ndarray:
        return np.concatenate([block @ weight_F + bias for block in self._blocks(at)])

    def by_layer(self, weight_F: np.ndarray) -> list[torch.Tensor]:
        """A weight for each layer's states [D]."""
        parts = weight_F.reshape(len(self.places), -1)
        if self.project_DW is not None:
            parts = parts @ self.project_DW.T
        return [torch.tensor(part, dtype=torch.float32) for part in parts]
