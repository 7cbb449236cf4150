"""A trait: opposite system prompts that bring it out, and questions that let it show.

Does not know models or answers.
"""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from ..errors import DataError, RecipeError, nearest
from ..text.sources import SHIPPED
from ..util.strict_json import parse
from ..util.strict_yaml import load

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Trait(BaseModel):
    """Prompts that bring a trait out, the opposite of each, and questions that let it show."""

    model_config = ConfigDict(extra="forbid")

    trait: Text
    positive_prompts: list[Text] = Field(min_length=1)
    negative_prompts: list[Text] = Field(min_length=1)
    questions: list[Text] = Field(min_length=1)

    @model_validator(mode="after")
    def _opposites(self) -> Self:
        if len(self.positive_prompts) != len(self.negative_prompts):
            raise ValueError(
                "expected one negative prompt for each positive one, found "
                f"{len(self.positive_prompts)} positive and {len(self.negative_prompts)} negative"
            )
        return self


def load_trait(source: str) -> Trait:
    """A trait from a YAML or JSON file, or `shipped:NAME`.

    Raises:
        DataError: no such file, not YAML, a field is unknown, missing or empty, or a prompt has no
            opposite.
    """
    try:
        text = _trait_text(source)
        is_json = source.endswith(".json")
        return Trait.model_validate(
            parse(text, source) if is_json else load(text, source, f"{source}: not YAML: ")
        )
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    except RecipeError as error:
        raise DataError(str(error)) from error
    except ValidationError as error:
        raise DataError(
            "\n".join(f"{source}: {_explain(item)}" for item in error.errors())
        ) from error


def _trait_text(source: str) -> str:
    if source.startswith("shipped:"):
        name = source.removeprefix("shipped:")
        shipped = sorted(path.name.removesuffix(".yaml") for path in (SHIPPED / "traits").iterdir())
        if name not in shipped:
            raise DataError(f"{source}: no such shipped trait{nearest(name, shipped)}")
        return (SHIPPED / "traits" / f"{name}.yaml").read_text("utf-8")
    if not Path(source).is_file():
        raise DataError(f"{source}: no such trait file")
    return Path(source).read_text("utf-8")


def _explain(item: Any) -> str:
    place, accepted = ".".join(map(str, item["loc"])), ", ".join(Trait.model_fields)
    if item["type"] == "extra_forbidden":
        return f"unknown key {place!r} (accepted: {accepted})"
    if item["type"] == "missing":
        return f"key {place!r} is missing (a trait has: {accepted})"
    found = "" if item["type"] == "value_error" else f", found {item['input']!r}"
    return f"{place or 'trait'}: {item['msg']}{found}"
