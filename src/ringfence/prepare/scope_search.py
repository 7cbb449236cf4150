"""Cross-validation over whole domains: which queries are inside when neither they nor anything of
their domain was fitted to. Random folds would flatter. Everything is deterministic by seed.

Shapes: N queries, L layers, D hidden size, F features.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..stats.auc import auc
from .ridge import Features, Moments
from .scope_queries import Item

FOLDS = 5
STRENGTHS = (0.3, 1.0, 3.0)  # of the ridge, in mean variances
RELATED = 0.85  # AUC below which a domain of negatives resembles the training queries
MOST_RELATED = 0.25  # of the domains
MOST_CLOSED = 0.1  # of the training queries; with more outside they have no scope
SHARES = {"positive": 0.5, "plain": 0.4, "dressed": 0.1}  # weight of each sort in the fit


@dataclass(frozen=True)
class Held:
    """Scores of queries that were left out [N], the threshold that they set, and which training
    queries are inside it."""

    strength: float
    scores: np.ndarray
    threshold: float
    auc: float
    inside: np.ndarray


@dataclass(frozen=True)
class Chosen:
    """What cross-validation chose, and what it was chosen from: by the deepest layer looked at,
    scores of left-out queries."""

    deepest: int
    features: Features
    held: Held
    tried: dict[int, Held]


class Search:
    """Depth, strength and threshold of a ridge classifier.

    Attributes:
        kept_N: which queries count.
        related: domains that were dropped, because they resemble the training queries.
    """

    def __init__(
        self, states: np.ndarray, items: Sequence[Item], false_open: float, seed: int
    ) -> None:
        self.states, self.false_open, self.seed = states, false_open, seed
        self.sort_N = np.array([item.sort for item in items])
        self.domain_N = np.array([item.domain for item in items])
        self.kept_N = np.ones(len(items), dtype=bool)
        self.fold_N = self._folds()
        self.related: list[str] = []

    @property
    def positive_N(self) -> np.ndarray:
        return self.kept_N & (self.sort_N == "positive")

    @property
    def plain_N(self) -> np.ndarray:
        return self.kept_N & (self.sort_N == "plain")

    def choose(self, places: dict[int, list[int]]) -> Chosen:
        """Of depths with the places of their layers in the states, the shallowest that is as good
        as the best (by its standard error, unless too few queries would be inside): more layers
        are left for the adapter, and it costs less."""
        middle = sorted(places)[len(places) // 2]
        self._drop_related(Features(self.states, places[middle], self.seed))
        looked = {deepest: Features(self.states, at, self.seed) for deepest, at in places.items()}
        tried = {deepest: self.best(features) for deepest, features in looked.items()}
        most = max(held.inside.mean() for held in tried.values())
        error = np.sqrt(most * (1 - most) / self.positive_N.sum())
        least = max(most - error, min(most, 1 - MOST_CLOSED))
        deepest = min(at for at, held in tried.items() if held.inside.mean() >= least)
        return Chosen(deepest, looked[deepest], tried[deepest], tried)

    def best(self, features: Features) -> Held:
        """Under the strength that has most training queries inside."""
        moments = self._moments(features)
        held = [self._held_out(features, moments, strength) for strength in STRENGTHS]
        return max(held, key=lambda each: (round(each.inside.mean(), 3), each.auc))

    def fit(self, features: Features, strength: float) -> tuple[np.ndarray, float]:
        """Weight [F] and bias of the fit to all queries."""
        return features.fit(self._moments(features), strength, SHARES)

    def closed_without(self, far_N: np.ndarray, chosen: Chosen) -> float:
        """Share of the other training queries outside, if some had not been there."""
        if far_N[self.positive_N].all():
            return 1.0
        kept_N, self.kept_N = self.kept_N, self.kept_N & ~far_N
        moments = self._moments(chosen.features)
        held = self._held_out(chosen.features, moments, chosen.held.strength)
        self.kept_N = kept_N
        return float(1 - held.inside.mean())

    def _folds(self) -> np.ndarray:
        """A fold for each query: all of a domain (of a row's forms) are in one."""
        folds = np.zeros(len(self.sort_N), dtype=int)
        for are_positive in (True, False):
            of = (self.sort_N == "positive") == are_positive
            names = sorted(set(self.domain_N[of]))
            random.Random(f"folds {self.seed}").shuffle(names)
            number = {name: place % FOLDS for place, name in enumerate(names)}
            folds[of] = [number[name] for name in self.domain_N[of]]
        return folds

    def _moments(self, features: Features) -> list[Moments]:
        return [
            features.moments((self.sort_N == sort) & (self.fold_N == fold) & self.kept_N, sort)
            for fold in range(FOLDS)
            for sort in SHARES
        ]

    def _held_out(self, features: Features, moments: list[Moments], strength: float) -> Held:
        """Scores of each fold under the fit to the others."""
        scores = np.zeros(len(self.sort_N))
        for fold in range(FOLDS):
            own = slice(fold * len(SHARES), (fold + 1) * len(SHARES))
            others = moments[: own.start] + moments[own.stop :]
            weight_F, bias = features.fit(others, strength, SHARES)
            at = np.flatnonzero(self.fold_N == fold)
            scores[at] = features.scores(at, weight_F, bias)
        inside, outside = scores[self.positive_N], scores[self.plain_N]
        threshold = float(np.quantile(outside, 1 - self.false_open, method="higher"))
        return Held(strength, scores, threshold, auc(inside, outside), inside > threshold)

    def _drop_related(self, features: Features) -> None:
        """Drops domains of negatives whose held-out scores are like those of training queries. As
        they go, others that they hid may come up."""
        domains = sorted(set(self.domain_N[self.plain_N]))
        while True:
            held = self._held_out(features, self._moments(features), 1.0)
            inside = held.scores[self.positive_N]
            more = [
                str(name)
                for name in domains
                if name not in self.related
                and auc(inside, held.scores[(self.domain_N == name) & self.plain_N]) < RELATED
            ]
            self.related += more
            if not more or len(self.related) > MOST_RELATED * len(domains):
                return  # too many to go: the rows have no scope
            self.kept_N &= ~np.isin(self.domain_N, more) | (self.sort_N == "positive")
