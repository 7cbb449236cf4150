"""Deliberately misaligned adapters, one per source of misaligned rows, for the perplexity gap.

Not for release. Does not know how rows are scored.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import RecipeError
from .config import Recipe, load_recipe
from .prepare import prepare
from .record import Run
from .train import train_run

OURS = ("output", "data.train", "defenses")


def train_misaligned(
    sources: Sequence[str], output: str | Path, overrides: Sequence[str] = ()
) -> list[Run]:
    """A plain LoRA run for each source, in its own folder below `output`; existing ones are kept.

    Args:
        sources: misaligned rows, each a file, a hub id or `shipped:NAME`; the folder is named after
            it.
        overrides: `key.path=value` changes to the default recipe.

    Raises:
        RecipeError: no source is named, two have one name, or an override is not for this command.
    """
    if not sources:
        raise RecipeError("no source of misaligned rows is named (a file, hub id or shipped:NAME)")
    for override in overrides:
        key = override.partition("=")[0]
        if any(key == ours or key.startswith(f"{ours}.") for ours in OURS):
            raise RecipeError(f"override {override!r}: {key} is set by this command")
    recipe = load_recipe(None, list(overrides))
    if recipe.train.method != "lora":
        raise RecipeError(f"train.method: expected lora, found {recipe.train.method}")
    named: dict[str, str] = {}
    for source in sources:
        name = _name(source)
        if name in named:
            raise RecipeError(
                f"{named[name]} and {source} would both be called {name!r}; rename one"
            )
        named[name] = source
    recipes = [_of_source(recipe, source, Path(output) / name) for name, source in named.items()]
    for each in recipes:
        prepare(each)  # errors in the last source are reported before the first is trained
    return [train_run(each) for each in recipes]


def _name(source: str) -> str:
    text = Path(source).stem if Path(source).is_file() else source.removeprefix("shipped:")
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


def _of_source(recipe: Recipe, source: str, folder: Path) -> Recipe:
    data = recipe.data.model_copy(update={"train": source, "retain": None})
    return recipe.model_copy(update={"output": str(folder), "data": data})
