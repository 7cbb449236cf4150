"""Settings of the drift monitor: the `monitor` part of a recipe."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..text.sources import OTHER_DOMAINS, VALUES
from ..util.strict_yaml import Real, Whole


class MonitorConfig(BaseModel):
    """Checks of drift during training, on a few paired questions, with alarms and an early end."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    every: Whole = Field(
        20, ge=1, le=10**9, description="steps between checks; the last step is checked too"
    )
    probes: Whole = Field(
        24, ge=2, le=10**6, description="paired questions, the same number of each domain"
    )
    questions: list[str] = Field(
        [*OTHER_DOMAINS, *VALUES], min_length=1, description="sources of the questions"
    )
    vectors: str | None = Field(
        None, description="a file of directions: how far responses move along them"
    )
    max_shift: Real | None = Field(
        None, gt=0, le=1e06, description="alarm above this mean margin shift, nats per token"
    )
    max_kl: Real | None = Field(
        None, gt=0, le=1e06, description="alarm above this KL to the reference, nats per token"
    )
    max_kv_drift: Real | None = Field(
        None, gt=0, le=1e06, description="alarm above this drift of the prefix's keys and values"
    )
    stop: bool = Field(False, description="the first alarm ends training")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by what they limit."""
        limits = {"shift": self.max_shift, "kl": self.max_kl, "kv_drift": self.max_kv_drift}
        return {name: limit for name, limit in limits.items() if limit is not None}

    @model_validator(mode="after")
    def _stops_at_something(self) -> Self:
        if self.stop and not self.limits:
            raise ValueError("stop: true needs a limit: max_shift, max_kl or max_kv_drift")
        return self
