"""The shapes of a run's records: a file cut off or edited by hand is reported, not stumbled over.

Only the fields that something is computed from are checked; files may hold more. Imports no torch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, Strict

from ..errors import DataError
from ..util.strict_json import check_shape, read_lines, read_record
from ..util.strict_yaml import read_text_and_mapping
from .names import EVALUATION

TRAIN = "delete it, and `ringfence train` recreates it"
EVALUATE = "delete it, and `ringfence evaluate` recreates it"
DIAGNOSE = "delete it, and `ringfence diagnose` recreates it"


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True)  # a broken model's numbers may be NaN


class _Step(_Shape):
    step: int


class _Logged(_Step):
    seconds: float


class _Training(_Shape):
    seconds: Annotated[float, Field(gt=0)]
    peak_memory_gib: float


class _Environment(_Shape):
    versions: dict[str, str | None]
    date: str | None = None
    rows: str | None = None
    held_out: str | None = None
    model: str | None = None
    ranks: PositiveInt = 1


class _Carriers(_Shape):
    role: Literal["prefix", "query", "postfix", "response", "template"]
    model: str
    pilot: str


class _Reference(_Shape):
    results: str = Field(pattern=r"^[^\x00]+$")


class _Compared(_Shape):
    model_config = ConfigDict(extra="forbid")  # a role by an old name must not be skipped
    control: str | None = Field(None, pattern=r"^[^\x00]+$")
    undefended: str | None = Field(None, pattern=r"^[^\x00]+$")


class _Bounds(BaseModel):  # with few answers they may be infinite
    model_config = ConfigDict(strict=True)
    mean: float
    low: float
    high: float


class _Calibration(_Shape):
    judge: str
    source: str
    weak: bool
    auc: _Bounds


class _Agreement(_Shape):
    items: NonNegativeInt
    alpha: float | None
    ranks: dict[str, float | None]


class _Judges(_Shape):
    calibrations: list[_Calibration]
    agreement: _Agreement | None = None


class _Table(_Shape):
    columns: list[str]
    rows: list[list[Any]]


class _Diagnosis(_Shape):
    key: str
    title: str
    sentence: str
    table: _Table
    figure: str = Field(pattern=r"^figures/\w+\.svg$")  # it goes into the page: no other file may


class _Lora(_Shape):
    rank: int
    alpha: float


class _Train(_Shape):
    method: str
    lora: _Lora
    epochs: float
    learning_rate: float
    batch_size: int
    accumulation: int
    precision: str


class _Data(_Shape):
    train: str


class _Recipe(_Shape):
    model: str
    seed: int
    data: _Data
    train: _Train
    defenses: dict[str, dict[str, Any]] | None = None


class _Given(_Shape):
    reference: str | None = None
    evaluate: dict[str, Any]


# ------------------------------------------------------------------ what was measured


def read_reference(file: Path) -> str:
    """reference.json: the path of the reference's results, relative to its folder."""
    return str(read_shape(file, _Reference, EVALUATE)["results"])


def read_judges(file: Path) -> dict[str, Any]:
    """judges.json."""
    return read_shape(file, _Judges, EVALUATE)


# ------------------------------------------------------------------ how it was made


def read_recipe(file: Path) -> tuple[str, dict[str, Any]]:
    """recipe.yaml of a run, or evaluation.yaml of a model that was only measured: its text and its
    values."""
    text, tree = read_text_and_mapping(file, "`ringfence train` writes it")
    again = "mend it, or delete the folder and recreate it"
    check_shape(_Given if file.name == EVALUATION else _Recipe, tree, str(file), again)
    return text, tree


def read_environment(file: Path, again: str = TRAIN) -> dict[str, Any]:
    """environment.json."""
    return read_shape(file, _Environment, again)


def read_training(file: Path, again: str = TRAIN) -> dict[str, Any]:
    """training.json, which says that a run is trained."""
    return read_shape(file, _Training, again)


def read_carriers(file: Path) -> dict[str, Any]:
    """carriers.json: the role that `treft.tokens: auto` chose, and what it was chosen on."""
    return read_shape(file, _Carriers, TRAIN)


def read_metrics(file: Path, again: str = TRAIN) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; an incomplete last line, which a kill leaves, is left out."""
    lines = []
    for line, place in read_lines(file, again, whole=True):
        if "step" not in line:
            raise DataError(
                f"{place}: not a line that ringfence wrote (no step): {line!r:.60}; {again}"
            )
        check_shape(_Logged if "loss" in line else _Step, line, place, again)
        for name, found in line.items():
            kind: Any = dict[str, Any] if name == "monitor" else Annotated[float, Strict()]
            check_shape(kind, found, place, again, (name,))
        lines.append(line)
    return lines


# ------------------------------------------------------------------ what was concluded from it


def read_diagnosis(file: Path) -> dict[str, Any]:
    """diagnosis.json, by name of the diagnosis."""
    found = read_record(file, DIAGNOSE)
    check_shape(dict[str, _Diagnosis], found, str(file), DIAGNOSE)
    return dict(found)


def read_compared(file: Path) -> dict[str, Any]:
    """compared.json: paths of the control and of the undefended run, relative to its folder."""
    return read_shape(file, _Compared, "delete it, and name --control and --undefended again")


def read_shape(file: Path, kind: Any, again: str) -> dict[str, Any]:
    """A JSON file that must have a shape (a pydantic model); DataError if it does not."""
    record = read_record(file, again)
    check_shape(kind, record, str(file), again)
    return dict(record)
