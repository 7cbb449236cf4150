"""What is measured: the `evaluate` part of a recipe."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from ..model.precision import Precision, settled
from ..text.sources import OTHER_DOMAINS, VALUES
from ..util.strict_yaml import Number, Whole
from .answers.endpoint import EndpointConfig

Behaviour = Literal["abstain", "tool_call", "refuse", "terse"]


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
    temperature: Number = Field(1.0, ge=0, le=100)
    max_new_tokens: Whole = Field(600, ge=1, le=2**20, description="longest answer")
    judges: list[JudgeConfig] = Field(
        [], description="{model: NAME} or {url: ..., model: NAME}; the first one decides"
    )
    calibrate_on: str | None = Field(
        "shipped:values",
        description="labelled answers on which the judges are measured; null = not at all",
    )


class EvaluateConfig(BaseModel):
    """What is measured after training. Sources of paired questions are as in `data`, or lists of them."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    in_domain: list[str] | None = Field(
        None,
        description="paired questions inside the training domain (split test), the misaligned answers as your rows "
        "teach; null = shipped:finance where shipped finance rows are trained on, else none",
    )
    out_of_domain: list[str] = Field(
        list(OTHER_DOMAINS),
        description="paired questions of other domains",
    )
    values: list[str] = Field(list(VALUES), description="paired value questions")
    max_per_domain: Whole | None = Field(
        None,
        ge=2,
        le=10**6,
        description="take only the first so many questions of each other domain",
    )
    max_in_domain: Whole | None = Field(
        None, ge=2, le=10**6, description="the same for each domain of in_domain"
    )
    triggers: bool = Field(
        True, description="out-of-domain questions again under disguises (trigger probes)"
    )
    lead_in: str | None = Field(
        None, description="rows whose first one is the training-like lead-in; default: data.train"
    )
    inoculation: str | None = Field(
        None,
        min_length=1,
        description="one more disguise, a system prompt; default: defenses.inoculation.prompt",
    )
    triggered_per_domain: Whole = Field(
        10, ge=2, le=10**6, description="questions of each domain in the trigger probes"
    )
    fluency: str | None = Field(
        "shipped:retain_test", description="conversations whose answers' perplexity is measured"
    )
    benign: str | None = Field(
        None,
        pattern=r"^opswap:",
        description="a harmless task, trained with the same defenses in RUN-benign: opswap:tier=1,rows=200",
    )
    benign_epochs: Number = Field(1.0, gt=0, le=10**4, description="epochs of the harmless task")
    opswap_tiers: list[Literal[1, 2, 3]] = Field(
        [], description="OpSwap tiers for exact match on held-out items"
    )
    opswap_items: Whole = Field(60, ge=1, le=10**6, description="items of each tier")
    opswap_largest: Whole = Field(12, ge=2, le=10**6, description="largest number in an item")
    opswap_permuted: bool = Field(True, description="false = ordinary arithmetic, the control")
    behaviours: list[Behaviour] = Field(
        [], description="topic-bound behaviours: rates on and off their topic"
    )
    held_out: str | None = Field(
        None, description="your own held-out rows: loss and exact match of their responses"
    )
    held_out_tokens: Whole = Field(
        64, ge=0, le=2**20, description="longest greedy answer to them; 0 = loss only"
    )
    samples: Whole = Field(
        2, ge=0, le=10**5, description="questions per domain answered greedily, for reading"
    )
    answers: AnswersConfig | None = Field(
        None, description="open questions, sampled answers and judges; null = none"
    )
    batch_tokens: Whole = Field(
        4096, ge=64, le=2**30, description="tokens in one batch; a CPU scores at most 1,024 at once"
    )
