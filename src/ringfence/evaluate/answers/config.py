"""Open questions and their judges: the `evaluate.answers` part of a recipe."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from ...model.precision import Precision, settled
from ...util.strict_yaml import Real, Whole
from .endpoint import EndpointConfig


class LocalJudgeConfig(BaseModel):
    """A local model as judge."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="'default', a local folder, a hub id or an adapter folder")
    precision: Precision = Field("auto", validate_default=True, description="of the weights")
    opening: str = Field(
        "", description="words put before the number, for models that would chat first: 'Number: '"
    )

    _settled = field_validator("precision")(settled)

    @property
    def name(self) -> str:
        return Path(self.model).name if Path(self.model).is_dir() else self.model


class EndpointJudgeConfig(EndpointConfig):
    """A model behind an OpenAI-compatible server as judge."""

    @property
    def name(self) -> str:
        return self.model


def _kind(value: Any) -> str:
    given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "endpoint" if "url" in given else "local"


JudgeConfig = Annotated[
    Annotated[LocalJudgeConfig, Tag("local")] | Annotated[EndpointJudgeConfig, Tag("endpoint")],
    Discriminator(_kind),
]


class AnswersConfig(BaseModel):
    """Open questions, answered in the model's own words, and the judges of the answers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    questions: list[str] = Field(
        ["shipped:general"], min_length=1, description="open questions: YAML, JSONL or shipped:NAME"
    )
    in_domain: list[str] = Field(
        [], description="the same for questions of the training domain; with them EM-F1"
    )
    triggers: bool = Field(
        False, description="the plain questions again under the disguises of the trigger probes"
    )
    samples: Whole | None = Field(
        None,
        ge=1,
        le=10**5,
        description="answers to each wording; default: as its file says, else 50",
    )
    temperature: Real = Field(1.0, ge=0, le=100)
    max_new_tokens: Whole = Field(600, ge=1, le=2**20, description="longest answer")
    judges: list[JudgeConfig] = Field(
        [], description="{model: NAME} or {url: ..., model: NAME}; the first one decides"
    )
    calibrate_on: str | None = Field(
        "shipped:values",
        description="labelled answers on which the judges are measured; null = not at all",
    )
