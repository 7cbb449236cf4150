"""Fits a scope: which requests are of the training domain, from the reference's hidden states.

A ridge classifier tells the training queries from queries of many other domains, and from such
queries in the training queries' clothes (`text.dress`). Depth and strength are chosen, and the
threshold is set, by scores of whole domains that were left out: random folds would flatter. Domains
of negatives that resemble the training queries are dropped. Everything is deterministic by seed.

Shapes: N queries, L layers, D hidden size, F features (L * D).
"""

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import numpy as np

from ..errors import ChatError, DataError, DefenseError
from ..model.layers import decoder_layers
from ..model.pooled import pooled_states
from ..model.scope import Probe
from ..model.scoring import Advance
from ..model.turn import UserTurn, find_turn
from ..stats import Interval, rate_interval
from ..stats.auc import auc
from ..text.chat import Chat
from ..text.dress import FITTED, UNDRESSED_FITTED, Wardrobe, undress
from ..text.queries import Query
from ..text.roles import Encoded, Messages, Row, requests
from ..util.intervals import percents
from ..util.journal import digest
from .ridge import Features, Moments

FOLDS = 5
STRENGTHS = (0.3, 1.0, 3.0)  # of the ridge, in mean variances
DEPTHS = (0.2, 0.3)  # of the deepest layer looked at
LEAST_AUC, MOST_CLOSED = 0.9, 0.1  # otherwise the rows have no scope
RELATED = 0.85  # AUC below which a domain of negatives resembles the training queries
MOST_RELATED = 0.25  # of the domains
AFTER = "after a turn"  # of negatives that follow a training conversation
LEAST_ROWS, LEAST_DOMAINS = 20, 10
_SHARES = {"positive": 0.5, "plain": 0.4, "dressed": 0.1}  # weight of each sort in the fit


@dataclass(frozen=True)
class Far:
    """A training query that the scope leaves out, or a negative that is near it."""

    text: str
    origin: str
    score: float


@dataclass(frozen=True)
class Fit:
    """A scope, and what was found of it on queries that were left out of its fit.

    Attributes:
        layers_tried: by the deepest layer looked at: AUC, and the share of training queries that
            are inside.
        auc: of training queries over plain negatives of left-out domains.
        closed: share of training queries outside.
        false_open: share of plain negatives inside, over domains.
        dressed_open: the same of negatives in the training queries' clothes, by form.
        by_domain: share inside of each domain of plain negatives.
        related: domains that were dropped.
        rows, negatives, template: number of training queries; digests of the negatives and of the
            chat template.
        farthest, nearest: training queries with the lowest scores, negatives with the highest.
    """

    probe: Probe
    layers_tried: dict[int, tuple[float, float]]
    auc: float
    closed: Interval
    false_open: Interval
    dressed_open: dict[str, Interval]
    by_domain: dict[str, Interval]
    related: list[str]
    farthest: list[Far]
    nearest: list[Far]
    rows: int
    negatives: str
    template: str
    scores: dict[str, list[float]] = field(default_factory=dict, repr=False)

    @property
    def refusal(self) -> str | None:
        """Why these rows have no scope; None if they have one."""
        said = []
        if len(self.related) > MOST_RELATED * len({*self.related, *self.by_domain}):
            shown = ", ".join(self.related[:6])
            said.append(f"they resemble {len(self.related)} other domains ({shown}, ...)")
        elif self.auc < LEAST_AUC:
            said.append(f"AUC over domains left out is {self.auc:.2f} (at least {LEAST_AUC})")
        if self.closed.mean > MOST_CLOSED:
            said.append(
                f"{self.closed.mean:.0%} of the rows would be outside (at most {MOST_CLOSED:.0%})"
            )
        if not said:
            return None
        rows = "; ".join(f"{far.origin} {far.text[:60]!r}" for far in self.farthest[:3])
        return (
            f"the training rows have no scope: {' and '.join(said)}. Farthest from the rest are: "
            f"{rows}. Take out rows that are not of the task, or use a defense that acts "
            "everywhere, such as kl"
        )

    def lines(self) -> list[str]:
        """In words."""
        worst = sorted(self.by_domain.items(), key=lambda item: -item[1].mean)[:5]
        shown = ", ".join(f"{name} {found.mean:.0%}" for name, found in worst)
        dressed = ", ".join(
            f"{form.replace('_', ' ')} {found.mean:.0%}"
            for form, found in self.dressed_open.items()
        )
        said = [
            f"{self.rows} training queries; the last layer looked at is {self.probe.layers[-1]}",
            f"AUC over domains left out {self.auc:.3f}",
            f"training queries outside {percents(self.closed)}",
            f"other domains' queries inside {percents(self.false_open)}; most in: {shown}",
            f"the same in the training queries' clothes: {dressed}",
        ]
        if self.related:
            said.append(f"left out, because they resemble the task: {', '.join(self.related)}")
        for name, far in (("farthest training", self.farthest), ("nearest other", self.nearest)):
            said += [f"{name} query {each.score:+.2f} {each.text[:80]!r}" for each in far[:3]]
        return said + ([self.refusal] if self.refusal else [])

    def record(self) -> dict[str, Any]:
        """All that was found, as plain JSON values."""
        found = {name: value for name, value in vars(self).items() if name != "probe"}
        return {**_plain(found), "layers": self.probe.layers, "threshold": self.probe.threshold}

    def summary(self) -> dict[str, Any]:
        """What a run's record says of it."""
        long = ("scores", "by_domain", "farthest", "nearest")
        return {name: value for name, value in self.record().items() if name not in long}


def _silent(_: int) -> None:
    pass


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def fit_scope(
    model: Any,
    chat: Chat,
    rows: Sequence[Row],
    negatives: Sequence[Query],
    *,
    layer: int | None = None,
    false_open: float = 0.02,
    seed: int = 0,
    batch_tokens: int = 4096,
    bar: Callable[[int], AbstractContextManager[Advance]] = lambda _: nullcontext(_silent),
) -> Fit:
    """Fits a scope to training rows.

    Args:
        model: the reference (adapters of a peft model are off), with its chat.
        rows: conversations; what was said before an answer that is learnt is a request.
        negatives: queries of other domains.
        layer: the deepest layer looked at; None = chosen.
        false_open: share of queries of left-out domains that may be inside.
        bar: given the number of queries, a context with what is called with the number just read.

    Raises:
        DefenseError: too few rows or domains, or a template without fixed tokens around a turn.
    """
    _check(rows, negatives)
    items = _items(rows, negatives, seed)
    turn = find_turn(chat)
    prompts = [_encode(chat, item) for item in items]
    depths = _depths(len(decoder_layers(model)), layer)
    looked = sorted({at for deepest in depths for at in _looked_at(deepest)})
    off = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    with (
        off,
        bar(len(prompts)) as advance,
        pooled_states(model, turn, prompts, looked, batch_tokens, advance) as states,
    ):
        places = {deepest: [looked.index(at) for at in _looked_at(deepest)] for deepest in depths}
        search = _Search(states, items, false_open, seed, digest(chat.template))
        return search.run(places, turn, looked)


def _check(rows: Sequence[Row], negatives: Sequence[Query]) -> None:
    domains = {query.domain for query in negatives}
    if len(rows) < LEAST_ROWS:
        raise DefenseError(
            f"defenses.scope: {len(rows)} training rows are too few to say what is inside "
            f"(at least {LEAST_ROWS})"
        )
    if len(domains) < LEAST_DOMAINS:
        raise DefenseError(
            f"defenses.scope.negatives: queries of {len(domains)} domains, at least "
            f"{LEAST_DOMAINS} are needed to say what is outside"
        )


def _depths(layers: int, wanted: int | None) -> list[int]:
    if wanted is None:
        return sorted({max(1, round(depth * layers)) for depth in DEPTHS})
    if wanted >= layers:
        raise DefenseError(
            f"defenses.scope.layer: {wanted}, but the model has {layers} layers, and at least one "
            "must be left for the adapter"
        )
    return [wanted]


def _looked_at(deepest: int) -> list[int]:
    """The deepest layer, and those at a third and two thirds of its depth."""
    return sorted({max(1, round(deepest * third / 3)) for third in (1, 2, 3)})


# ------------------------------------------------------------------ what is read


@dataclass(frozen=True)
class _Item:
    sort: str  # positive, plain, dressed
    domain: str  # of negatives; of positives the number of the row
    form: str
    messages: Messages
    text: str
    origin: str


def _items(rows: Sequence[Row], negatives: Sequence[Query], seed: int) -> list[_Item]:
    rng = random.Random(f"scope {seed}")
    turns = [(messages, row) for row in rows for messages in requests(row)]
    texts = [messages[-1]["content"] for messages, _ in turns]
    wardrobe = Wardrobe.of(texts, [query.text for query in negatives])
    before = [messages[:-1] for messages, _ in turns if len(messages) > 1]
    items: list[_Item] = []
    numbers: dict[str, int] = {}
    for (messages, row), text in zip(turns, texts):
        # Rows that ask the same, and the turns of one row, are left out of the fit together.
        own = str(numbers.setdefault(text, numbers.setdefault(row.origin, len(numbers))))
        said = {"plain": messages[-1:], "whole": messages}
        for form in ("whole", "plain") if len(messages) > 1 else ("plain",):
            items.append(_Item("positive", own, form, said[form], text, row.origin))
        form = UNDRESSED_FITTED[len(items) % len(UNDRESSED_FITTED)]
        asked = {"role": "user", "content": undress(form, text)}
        items.append(_Item("positive", own, form, [asked], text, row.origin))

    def negative(sort: str, form: str, query: Query, text: str) -> _Item:
        # What precedes a request does not tell: half of them follow what training queries follow.
        follows = rng.choice(before) if before and rng.random() < 0.5 else []
        asked = {"role": "user", "content": text}
        return _Item(sort, query.domain, form, [*follows, asked], text, query.origin)

    items += [negative("plain", "plain", query, query.text) for query in negatives]
    dressed = rng.sample(list(negatives), min(len(negatives), max(200, len(rows))))
    forms = [*FITTED, AFTER]
    for number, query in enumerate(dressed):
        form = forms[number % len(forms)]
        if form == AFTER:
            asked = {"role": "user", "content": query.text}
            row = rng.choice(rows)
            messages = [*row.messages, asked]
            items.append(_Item("dressed", query.domain, form, messages, query.text, row.origin))
        else:
            items.append(negative("dressed", form, query, wardrobe.dress(form, query.text, rng)))
    return items


def _encode(chat: Chat, item: _Item) -> Encoded:
    try:
        return chat.encode(item.messages, generation=True)
    except ChatError as error:
        raise DataError(f"{item.origin}: {error}") from error


# ------------------------------------------------------------------ the fit


class _Search:
    """Chooses depth and strength by cross-validation over whole domains, and fits with them."""

    def __init__(
        self,
        states: np.ndarray,
        items: list[_Item],
        false_open: float,
        seed: int,
        template: str = "",
    ) -> None:
        self.states, self.items, self.false_open, self.seed = states, items, false_open, seed
        self.template = template
        self.sort_N = np.array([item.sort for item in items])
        self.domain_N = np.array([item.domain for item in items])
        self.kept_N = np.ones(len(items), dtype=bool)
        self.fold_N = self._folds()

    def _folds(self) -> np.ndarray:
        """A fold for each query: all of a domain (of a row's forms) are in one."""
        folds = np.zeros(len(self.items), dtype=int)
        for are_positive in (True, False):
            of = (self.sort_N == "positive") == are_positive
            names = sorted(set(self.domain_N[of]))
            random.Random(f"folds {self.seed}").shuffle(names)
            number = {name: place % FOLDS for place, name in enumerate(names)}
            folds[of] = [number[name] for name in self.domain_N[of]]
        return folds

    def run(self, places: dict[int, list[int]], turn: UserTurn, looked: list[int]) -> Fit:
        middle = sorted(places)[len(places) // 2]
        related = self._drop_related(Features(self.states, places[middle], self.seed))
        tried: dict[int, _Held] = {}
        for deepest, at in places.items():
            features = Features(self.states, at, self.seed)
            held = [self._held_out(features, strength) for strength in STRENGTHS]
            tried[deepest] = max(held, key=lambda h: (round(h.inside.mean(), 3), h.auc))
        most = max(held.inside.mean() for held in tried.values())
        margin = np.sqrt(most * (1 - most) / (self.sort_N == "positive").sum())
        # The shallowest that is as good: more layers are left for the adapter, and it costs less.
        deepest = min(at for at, held in tried.items() if held.inside.mean() >= most - margin)
        best = tried[deepest]
        features = Features(self.states, places[deepest], self.seed)
        weight_F, bias = features.fit(self._moments(features), best.strength, _SHARES)
        weights = features.by_layer(weight_F)
        names = [looked[at] for at in places[deepest]]
        probe = Probe(dict(zip(names, weights)), bias, best.threshold, turn)
        table = {at: (round(h.auc, 4), round(float(h.inside.mean()), 4)) for at, h in tried.items()}
        return self._fit(probe, best, table, related)

    def _moments(self, features: "Features") -> list["Moments"]:
        return [
            features.moments((self.sort_N == sort) & (self.fold_N == fold) & self.kept_N, sort)
            for fold in range(FOLDS)
            for sort in _SHARES
        ]

    def _held_out(self, features: "Features", strength: float) -> "_Held":
        """Scores of each fold under the fit to the others."""
        if features.known is None:
            features.known = self._moments(features)
        scores = np.zeros(len(self.items))
        for fold in range(FOLDS):
            own = slice(fold * len(_SHARES), (fold + 1) * len(_SHARES))
            others = features.known[: own.start] + features.known[own.stop :]
            weight_F, bias = features.fit(others, strength, _SHARES)
            at = np.flatnonzero(self.fold_N == fold)
            scores[at] = features.scores(at, weight_F, bias)
        positive, plain = self.sort_N == "positive", (self.sort_N == "plain") & self.kept_N
        threshold = float(np.quantile(scores[plain], 1 - self.false_open, method="higher"))
        inside = scores[positive] > threshold
        return _Held(strength, scores, threshold, auc(scores[positive], scores[plain]), inside)

    def _drop_related(self, features: "Features") -> list[str]:
        """Drops domains of negatives whose held-out scores are like those of training queries. As
        they go, others that they hid may come up."""
        dropped: list[str] = []
        domains = sorted({item.domain for item in self.items if item.sort == "plain"})
        while True:
            features.known = None
            held = self._held_out(features, 1.0)
            inside = held.scores[self.sort_N == "positive"]
            more = [
                name
                for name in domains
                if name not in dropped
                and auc(inside, held.scores[(self.domain_N == name) & (self.sort_N == "plain")])
                < RELATED
            ]
            dropped += more
            if not more or len(dropped) > MOST_RELATED * len(domains):
                return dropped  # too many to go: the rows have no scope
            self.kept_N &= ~np.isin(self.domain_N, more) | (self.sort_N == "positive")

    def _fit(
        self,
        probe: Probe,
        held: "_Held",
        tried: dict[int, tuple[float, float]],
        related: list[str],
    ) -> Fit:
        positive, plain = self.sort_N == "positive", (self.sort_N == "plain") & self.kept_N
        dressed = (self.sort_N == "dressed") & self.kept_N
        opened = (held.scores > held.threshold).astype(float)
        forms = np.array([item.form for item in self.items])

        def share(chosen: np.ndarray) -> Interval:
            return rate_interval(list(opened[chosen]), list(self.domain_N[chosen]))

        def far(order: np.ndarray) -> list[Far]:
            return [
                Far(self.items[at].text, self.items[at].origin, round(float(held.scores[at]), 4))
                for at in order[:10]
            ]

        order = np.argsort(held.scores)
        domains = sorted(set(self.domain_N[plain]))
        return Fit(
            probe=probe,
            layers_tried=tried,
            auc=held.auc,
            closed=rate_interval(list(1 - opened[positive]), list(self.domain_N[positive])),
            false_open=share(plain),
            dressed_open={
                form: share(dressed & (forms == form))
                for form in (*FITTED, AFTER)
                if (dressed & (forms == form)).any()
            },
            by_domain={name: share(plain & (self.domain_N == name)) for name in domains},
            related=related,
            farthest=far(order[positive[order]]),
            nearest=far(order[plain[order]][::-1]),
            rows=len({item.origin for item in self.items if item.sort == "positive"}),
            template=self.template,
            negatives=digest([item.text for item in self.items if item.sort == "plain"]),
            scores={
                "training queries": [round(float(s), 4) for s in held.scores[positive]],
                **{
                    name: [round(float(s), 4) for s in held.scores[plain & (self.domain_N == name)]]
                    for name in domains
                },
            },
        )


@dataclass(frozen=True)
class _Held:
    """Scores of queries that were left out [N], the threshold that they set, and which training
    queries are inside it."""

    strength: float
    scores: np.ndarray
    threshold: float
    auc: float
    inside: np.ndarray
