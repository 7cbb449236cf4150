"""The scores of a pool of safe rows, as a file (see `gap`, which makes it)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from ..errors import DataError, RecipeError, nearest
from ..util.journal import split_table
from ..util.strict_json import whole_lines

# Nats per token; keeps rows that the reference knows by heart from winning by division.
EPS = 1.0
TABLE = "perplexity gaps"


def gap(reference: float, misaligned: Sequence[float]) -> float:
    """(mean misaligned NLL - reference NLL) / (reference NLL + 1).

    It is high where misalignment makes an answer unlikely.
    """
    return (sum(misaligned) / len(misaligned) - reference) / (reference + EPS)


class _Key(BaseModel):
    model: str
    adapters: dict[str, str]


class ScoredRow(BaseModel):
    """What is read of a line: negative log-likelihoods, in nats per token."""

    digest: str
    reference: float = Field(ge=0, allow_inf_nan=False)
    misaligned: dict[str, FiniteFloat]
    refusal: bool


@dataclass(frozen=True)
class GapTable:
    """Scores of a pool: `lines` by digest of the messages, `model` the reference's fingerprint."""

    file: Path
    model: str
    adapters: list[str]
    lines: dict[str, dict[str, Any]]

    def scores(self, leave_out: Sequence[str] = ()) -> dict[str, float]:
        """The score of every row, over all adapters except those left out.

        Raises:
            RecipeError: a name is not an adapter of the table, or none is left.
        """
        for name in leave_out:
            if name not in self.adapters:
                raise RecipeError(
                    f"leave_out: {self.file} has no adapter {name!r}{nearest(name, self.adapters)}"
                )
        used = [name for name in self.adapters if name not in leave_out]
        if not used:
            raise RecipeError(
                f"leave_out: no adapter of {self.file} is left (it has {', '.join(self.adapters)})"
            )
        return {
            key: gap(line["reference"], [line["misaligned"][n] for n in used])
            for key, line in self.lines.items()
        }


def read_table(file: str | Path) -> GapTable:
    """The table that `score_pool` wrote.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{file}: no such table of scores (make one with `ringfence score-gap`)")
    text = path.read_text("utf-8", errors="replace")
    header, lines = split_table(whole_lines(text), path, TABLE)
    place = f"{path}:1"
    try:
        key = _Key.model_validate(header.get("key"))
        for number, line in enumerate(lines, 2):
            place = f"{path}:{number}"
            missing = set(key.adapters) - set(ScoredRow.model_validate(line).misaligned)
            if missing:
                raise DataError(
                    f"{place}: no score under adapter {min(missing)!r}; `ringfence score-gap` "
                    "makes one"
                )
    except ValidationError as error:
        found = error.errors()[0]
        field = ".".join(map(str, found["loc"])) or "line"
        raise DataError(f"{place}: {field}: {found['msg']}, found {found['input']!r}") from error
    return GapTable(path, key.model, list(key.adapters), {line["digest"]: line for line in lines})
