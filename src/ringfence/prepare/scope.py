"""Fits a scope: which requests are of the training domain, from the reference's hidden states.

A ridge classifier tells the training queries from queries of many other domains, and from such
queries in the training queries' clothes. Depth and strength are chosen, and the threshold is set,
by scores of whole domains that were left out (`scope_search`).

Shapes: N queries.
"""

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
from ..model.turn import find_turn
from ..stats import Interval, rate_interval
from ..text.chat import Chat
from ..text.dress import FITTED
from ..text.queries import Query
from ..text.roles import Encoded, Row
from ..util.intervals import percents
from ..util.journal import digest
from .scope_queries import AFTER, Item, asking, items_of
from .scope_search import MOST_CLOSED, MOST_RELATED, Chosen, Search

DEPTHS = (0.2, 0.3)  # of the deepest layer looked at
LEAST_AUC = 0.9  # otherwise the rows have no scope
LEAST_ROWS, LEAST_DOMAINS = 20, 10


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
        far: share of training queries that look more like other domains' than like the rest.
        closed_without_far: share of the rest outside, if those were not there.
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
    far: float
    closed_without_far: float
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
        if self.far:
            said.append(
                f"training queries more like other domains' than like the rest {self.far:.0%}; "
                f"without them {self.closed_without_far:.0%} of the rest would be outside"
            )
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
    items = items_of(rows, negatives, seed)
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
        search = Search(states, items, false_open, seed)
        chosen = search.choose(places)
        weight_F, bias = search.fit(chosen.features, chosen.held.strength)
        weights = dict(zip(_looked_at(chosen.deepest), chosen.features.by_layer(weight_F)))
        probe = Probe(weights, bias, chosen.held.threshold, turn)
        return _told(probe, search, chosen, items, digest(chat.template))


def _check(rows: Sequence[Row], negatives: Sequence[Query]) -> None:
    domains = {query.domain for query in negatives}
    if asking(rows) < LEAST_ROWS:
        raise DefenseError(
            f"defenses.scope: {asking(rows)} training rows with a request are too few to say what "
            f"is inside (at least {LEAST_ROWS})"
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


def _encode(chat: Chat, item: Item) -> Encoded:
    try:
        return chat.encode(item.messages, generation=True)
    except ChatError as error:
        raise DataError(f"{item.origin}: {error}") from error


def _told(
    probe: Probe, search: Search, chosen: Chosen, items: Sequence[Item], template: str
) -> Fit:
    """A probe with what was found of it."""
    scores, plain = chosen.held.scores, search.plain_N
    positive = search.positive_N
    dressed = search.kept_N & (search.sort_N == "dressed")
    opened = (scores > chosen.held.threshold).astype(float)
    forms = np.array([item.form for item in items])
    far_N = positive & (scores < 0)  # the targets are +1 and -1

    def share(of: np.ndarray) -> Interval:
        return rate_interval(list(opened[of]), list(search.domain_N[of]))

    def first(order: np.ndarray) -> list[Far]:
        """Ten, of each row or query only the first."""
        places: dict[str, int] = {}
        for at in order:
            places.setdefault(items[at].origin, at)
        chosen = [*places.values()][:10]
        return [Far(items[at].text, items[at].origin, round(float(scores[at]), 4)) for at in chosen]

    order = np.argsort(scores)
    domains = [str(name) for name in sorted(set(search.domain_N[plain]))]
    own = {name: plain & (search.domain_N == name) for name in domains}
    return Fit(
        probe=probe,
        layers_tried={
            at: (round(held.auc, 4), round(float(held.inside.mean()), 4))
            for at, held in chosen.tried.items()
        },
        auc=chosen.held.auc,
        closed=rate_interval(list(1 - opened[positive]), list(search.domain_N[positive])),
        false_open=share(plain),
        dressed_open={
            form: share(dressed & (forms == form))
            for form in (*FITTED, AFTER)
            if (dressed & (forms == form)).any()
        },
        by_domain={name: share(chosen_N) for name, chosen_N in own.items()},
        far=float(far_N[positive].mean()),
        closed_without_far=search.closed_without(far_N, chosen),
        related=search.related,
        farthest=first(order[positive[order]]),
        nearest=first(order[plain[order]][::-1]),
        rows=len({item.origin for item in items if item.sort == "positive"}),
        template=template,
        negatives=digest([item.text for item in items if item.sort == "plain"]),
        scores={
            "training queries": [round(float(s), 4) for s in scores[positive]],
            **{
                name: [round(float(s), 4) for s in scores[chosen_N]]
                for name, chosen_N in own.items()
            },
        },
    )
