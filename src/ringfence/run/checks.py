"""Refusals before anything is loaded: another run's folder, changed weights or rows, sharding."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..defenses import Training
from ..errors import RecipeError
from ..processes import world
from ..runfolder.folder import check_checkpoints
from ..runfolder.names import CHECKPOINTS, ENVIRONMENT, RECIPE, is_run
from ..runfolder.shapes import read_environment
from ..training.ranks import deepspeed_stage, device_settings, sharding, shards
from .config import ANOTHER, Recipe, stored_recipe


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Whether a run of this recipe can continue in this folder.

    Raises:
        RingfenceError: the folder holds a run of another recipe, or somebody else's checkpoints.
    """
    check_checkpoints(folder / CHECKPOINTS)
    if is_run(folder):
        fields = {"model", "data", "train", "defenses", "monitor", "seed"}
        there, here = (
            each.model_dump(mode="json", include=fields)
            for each in (stored_recipe(folder / RECIPE), recipe)
        )
        if there != here:
            raise RecipeError(
                f"{folder} holds a run of another recipe ({'; '.join(_differences(there, here))}); "
                "choose another output, or delete the folder"
            )


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Fields in which two trees differ: `train.epochs: 1.0 there, 4.0 here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
    elif there != here:
        yield f"{name}: {there!r} there, {here!r} here"


def check_rows(folder: Path, digest: str, trained: bool) -> None:
    """The rows of a run, and the number of processes, must be those it was started with."""
    file = folder / ENVIRONMENT
    new = {"rows": digest, "ranks": world()}
    there = read_environment(file, ANOTHER) if file.is_file() else new
    if there.get("rows") != digest:
        raise RecipeError(
            f"{folder}: the rows have changed since; choose another output, or delete the folder"
        )
    if not trained and there.get("ranks", 1) != world():
        raise RecipeError(
            f"{folder}: started with {there.get('ranks', 1)} processes, found {world()}; a step "
            "would have other rows: start as many, or choose another output"
        )


def check_weights(folder: Path, recipe: Recipe, weights: str) -> None:
    """What was trained, fully or partly, must be based on the model's present weights."""
    file = folder / ENVIRONMENT
    there = read_environment(file, ANOTHER) if file.is_file() else {}
    if there.get("model", weights) != weights:
        raise RecipeError(
            f"{folder}: the files of model {recipe.model} have changed since this run was started; "
            "choose another output, or delete the folder"
        )


def check_ranks(recipe: Recipe) -> None:
    """Refuses what cannot be done with sharded weights."""
    how = sharding()
    if shards() and recipe.train.precision == "nf4":
        raise RecipeError(
            f"train.precision: nf4: 4-bit weights cannot be sharded ({how}); accepted: bf16, fp32"
        )
    if shards() and recipe.train.compile:
        raise RecipeError(f"train.compile: not with sharded weights ({how}); set it to false")
    if shards() and recipe.train.method == "full" and recipe.monitor:
        raise RecipeError(
            f"monitor: with train.method: full it copies the head, which cannot be sharded ({how})"
        )
    if device_settings()["backend"] and recipe.train.precision != "fp32":
        raise RecipeError(
            f"train.precision: {recipe.train.precision}: DeepSpeed on CPUs computes only in fp32"
        )
    training = Training(recipe.train.method, deepspeed=deepspeed_stage())
    if reason := recipe.defenses.refusal(training):
        raise RecipeError(f"defenses.{reason}")
