"""Scope: the adapter acts only where the task is (ours). A probe on the reference's own hidden
states decides for each request; outside, the model is the reference, to the bit."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..errors import DefenseError
from ..processes import from_main, is_main
from ..text.queries import NEGATIVES, Query, load_queries
from ..util.console import progress
from ..util.strict_yaml import Layer, Real
from .base import Defense, DefenseConfig, Setup, Training

if TYPE_CHECKING:
    from ..prepare.scope import Fit


class Scope(DefenseConfig):
    """The adapter acts only on requests like the training rows'."""

    negatives: list[str] = Field(
        [NEGATIVES],
        min_length=1,
        description="queries of other domains, what the task is not (records with query and "
        "domain, or rows); those of data.retain are added",
    )
    layer: Layer | None = Field(
        None, description="deepest layer whose states decide, from 1; null = chosen by the fit"
    )
    adapters: Literal["above", "all"] = Field(
        "above",
        description="above: the adapter is on the layers after it alone, so that deciding costs "
        "nothing in use; all: on all layers, and the reference reads each prompt up to it first",
    )
    false_open: Real = Field(
        0.02, gt=0, le=0.5, description="share of other domains' queries that may be inside"
    )
    router: bool = Field(
        False, description="save a plain adapter, for a router that decides before it is asked"
    )

    def refuses(self, training: Training) -> str | None:
        if training.method == "full":
            return (
                "scope needs train.method: lora: there must be an adapter that can be off; full "
                "fine-tuning changes the reference itself"
            )
        if training.further:
            return "scope would read its base's states, not those of the adapter that is trained"
        return None

    def build(self, setup: Setup) -> "ScopeDefense":
        return ScopeDefense(self, setup, self.queries(setup))

    def queries(self, setup: Setup) -> list[Query]:
        """What the task is not."""
        negatives = [query for source in self.negatives for query in load_queries(source)]
        return [*negatives, *setup.retain_queries]

    @staticmethod
    def load(folder: str | Path) -> Any:
        """The decision alone, from a saved scope: see `model.router.Router`."""
        from ..model.router import Router

        return Router.load(folder)


class ScopeDefense(Defense):
    name = "scope"

    def __init__(self, config: Scope, setup: Setup, negatives: Sequence[Query]) -> None:
        self.config, self.setup, self.negatives = config, setup, negatives
        self.fit: Fit | None = None

    def before_adapter(self, reference: Any) -> int:
        """Fits the probe.

        Raises:
            DefenseError: the training rows have no scope.
        """
        # Ranks must agree on the layers.
        self.fit = fit = from_main(self._fitted(reference) if is_main() else None)
        if fit.refusal:
            raise DefenseError(f"defenses.scope: {fit.refusal}")
        return fit.probe.layers[-1] + 1 if self.config.adapters == "above" else 1

    def _fitted(self, reference: Any) -> "Fit":
        from ..prepare.scope import fit_scope

        return fit_scope(
            reference,
            self.setup.chat,
            self.setup.rows,
            self.negatives,
            layer=self.config.layer,
            false_open=self.config.false_open,
            seed=self.setup.seed,
            bar=partial(progress, "scope: queries read"),
        )

    def save(self, folder: Path) -> None:
        if self.fit:
            self.fit.probe.save(folder, self.fit.record(), self.config.router)

    def record(self) -> dict[str, Any]:
        return {} if self.fit is None else self.fit.summary()
