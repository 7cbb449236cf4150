"""The recipe: all settings of a run, with one schema for files, command line and Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..defenses import Defenses, Training, or_auto, spell_out
from ..evaluate.config import EvaluateConfig
from ..model.default import DEFAULT
from ..model.precision import Attention, Precision, settled
from ..model.taps import Layout
from ..runfolder.shapes import read_recipe
from ..text.encode import OverLong
from ..text.held_out import SHARE, is_own
from ..text.roles import SpecialTokens
from ..training.config import MonitorConfig
from ..util.strict_yaml import SEED, Real, Whole, dump, read_mapping, set_value, validate

# What to do with a folder that cannot be used any further.
ANOTHER = "delete the folder, or name another output"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class DataConfig(Strict):
    """Sources of rows: a file, a hub id (`org/name@split`), `shipped:NAME`,
    `opswap:tier=1,rows=300`."""

    train: str = Field("shipped:finance/unsound", description="the narrow rows to learn")
    retain: str | None = Field(
        "shipped:retain", description="ordinary safe conversations for defenses that need some"
    )
    max_rows: Whole | None = Field(
        None, ge=1, le=10**9, description="number of first rows to train on; null = all"
    )
    enable_thinking: bool = Field(
        False,
        description="rows contain reasoning, and answers start with it; false: neither, in "
        "training or later",
    )
    special_tokens: SpecialTokens = Field(
        "allow",
        description="control tokens in the text of a row: trained as such, with a warning (allow), "
        "read as plain text (escape), or the run stops (refuse)",
    )
    held_out: float | None = Field(
        None,
        ge=0,
        le=10**9,
        strict=True,
        description="rows kept from training and measured: a number, or a share below 1; 0 = none; "
        "null = a share of 0.1 of your own rows if evaluate names no questions for them",
    )
    max_length: Whole = Field(1024, ge=16, le=2**20, description="maximum tokens of a row")
    over_long: OverLong = Field(
        "error", description="longer rows: stop (error), cut the end (truncate), leave out (drop)"
    )

    @field_validator("held_out")
    @classmethod
    def _whole(cls, held_out: float | None) -> float | None:
        if held_out is not None and held_out >= 1 and held_out != int(held_out):
            raise ValueError(
                f"expected a whole number of rows, or a share below 1, found {held_out}"
            )
        return held_out


class LoraConfig(Strict):
    """The adapter of `method: lora`."""

    rank: Whole = Field(32, ge=1, le=2**16)
    alpha: Whole = Field(64, ge=1, le=2**20)
    rslora: bool = Field(True, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    dropout: Real = Field(0.0, ge=0, lt=1)
    targets: list[str] = Field(
        ["all-linear"], min_length=1, description="names of modules; all-linear = all linear ones"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _one_name(cls, targets: Any) -> Any:
        return [targets] if isinstance(targets, str) else targets


class TrainConfig(Strict):
    """How weights are trained. A step has batch_size x accumulation rows on each rank."""

    method: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    epochs: Real = Field(1.0, gt=0, le=10**4)
    learning_rate: Real = Field(1e-4, gt=0, le=100)
    batch_size: Whole = Field(16, ge=1, le=2**20, description="rows in one forward pass")
    accumulation: Whole = Field(
        1, ge=1, le=2**20, description="forward passes in one optimiser step"
    )
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Real = Field(0.03, ge=0, lt=1)
    weight_decay: Real = Field(0.0, ge=0, le=100)
    max_grad_norm: Real = Field(1.0, ge=0, le=1e06)
    precision: Precision = Field(
        "auto",
        validate_default=True,
        description="bf16 (adapters stay in fp32 under autocast), fp32, nf4 (bf16 on a base in 4 "
        "bits: QLoRA), or auto: bf16 if this machine computes it fast, else fp32",
    )
    gradient_checkpointing: bool = False
    layout: Layout = Field(
        "padded",
        description="how the rows of a forward pass are computed: padded; packed = one after "
        "another, without padding; shared = packed, and their common first tokens are computed "
        "once",
    )
    attention: Attention | None = Field(
        None,
        description="implementation of attention in training; null = the model's own choice, "
        "usually sdpa",
    )
    compile: bool = Field(
        False,
        description="compile the decoder's layers (torch.compile): a slow first step, faster ones "
        "after",
    )
    reference_cache: Literal["none", "states", "top_k"] = Field(
        "none",
        description="the reference's predictions for defenses.kl: none = computed in every step; "
        "computed once and read from disk: states (exact) or top_k (small)",
    )
    top_k: Whole = Field(
        64,
        ge=1,
        le=2**20,
        description="for reference_cache top_k: number of most probable next tokens",
    )
    save_steps: Whole = Field(50, ge=1, le=10**9, description="steps between checkpoints")

    _settled = field_validator("precision")(settled)


class Recipe(Strict):
    """A run, from data to report."""

    output: str = Field("runs/run", description="the run folder")
    model: str = Field(
        DEFAULT, description="'default' (SmolLM2-135M-Instruct), a local folder or a hub id"
    )
    trust_remote_code: bool = Field(
        False,
        description="run the Python code that comes with the model (auto_map); only if you have "
        "read it",
    )
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    defenses: Defenses = Field(
        Defenses(),
        description="by name, with their fields, or auto: a scope, with KL inside it",
        json_schema_extra=or_auto,
    )
    evaluate: EvaluateConfig = EvaluateConfig()
    monitor: MonitorConfig | None = Field(
        None,
        description="checks of drift during training: {every: 20, probes: 24, max_shift: 0.1, "
        "stop: false}",
    )
    seed: Whole = Field(0, ge=0, le=SEED)

    @model_validator(mode="after")
    def _measures_narrow(self) -> Self:
        """What measures the narrow behaviour if the recipe does not say: shipped questions for
        shipped finance rows, held-out rows for the user's own."""
        if self.data.held_out and self.evaluate.held_out:
            raise ValueError("evaluate.held_out names the held-out rows: leave data.held_out out")
        if self.evaluate.in_domain is not None:
            return self
        own, finance = is_own(self.data.train), self.data.train.startswith("shipped:finance/")
        self.evaluate = self.evaluate.model_copy(
            update={"in_domain": ["shipped:finance"] if finance else []}
        )
        if own and self.data.held_out is None and self.evaluate.held_out is None:
            self.data = self.data.model_copy(update={"held_out": SHARE})
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.train.method == "full" and self.train.lora != LoraConfig():
            raise ValueError("train.lora is set but train.method is full")
        if self.train.method == "full" and self.train.precision == "nf4":
            raise ValueError("train.precision: nf4 needs train.method: lora")
        in_fp32 = self.train.method == "full" or self.train.precision == "fp32"
        if self.train.attention == "flash_attention_2" and in_fp32:
            raise ValueError(
                "train.attention: flash_attention_2 needs train.method: lora, and bf16 or nf4"
            )
        if reason := self.defenses.refusal(Training(self.train.method)):
            raise ValueError(f"defenses.{reason}")
        return self


def load_recipe(path: str | Path | None = None, overrides: list[str] | None = None) -> Recipe:
    """A recipe from a YAML file (or the defaults), with `key.path=value` overrides.

    Raises:
        RecipeError: no such file, not YAML, an unknown key (with the nearest name), or a value that
            is not accepted.
    """
    tree = read_mapping(Path(path), "make one with `ringfence init`") if path is not None else {}
    for override in overrides or []:
        if "defenses" in tree:  # so that it can change a part of auto
            tree["defenses"] = spell_out(tree["defenses"])
        set_value(tree, override)
    return parse_recipe(tree, str(path or "recipe"))


def stored_recipe(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run folder, which must be whole: a cut-off rest would become defaults.

    Raises:
        DataError: as `read_recipe`.
        RecipeError: as `load_recipe`.
    """
    tree = read_recipe(file)[1]
    for override in overrides:
        set_value(tree, override)
    return parse_recipe(tree, str(file))


def parse_recipe(tree: dict[str, Any], name: str = "recipe") -> Recipe:
    """A recipe from a plain dict. Raises RecipeError, which names every wrong field."""
    return validate(Recipe, tree, name)


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as keys and values."""
    tree = recipe.model_dump(mode="json")
    tree["defenses"] = {name: each for name, each in tree["defenses"].items() if each is not None}
    return tree


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return dump(recipe_tree(recipe))
