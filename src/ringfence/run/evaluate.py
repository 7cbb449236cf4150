"""Measures a run, or an existing model."""

import json
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..evaluate.evaluation import Evaluation, evaluate_folder
from ..evaluate.plan import check_evaluation
from ..model.default import resolve
from ..model.files import adapter_base, load_tokenizer, trust
from ..runfolder.folder import check_folder, hold
from ..runfolder.names import ENVIRONMENT, EVALUATION, RECIPE, is_evaluation, is_run
from ..runfolder.shapes import read_environment, read_recipe
from ..text.chat import Chat
from ..util.files import write_whole
from ..util.machine import environment
from ..util.quiet import quiet_libraries
from ..util.strict_yaml import dump, set_value, validate
from .config import ANOTHER, dump_recipe, stored_recipe
from .prepare import chat_of, evaluation, held_out_digest
from .record import Run


@quiet_libraries()
def evaluate_target(
    target: str,
    overrides: list[str],
    reference: str | None = None,
    endpoint: str | None = None,
    output: Path | None = None,
) -> Path:
    """Measures a run, or an existing model, whose results go to the folder `output`.

    Args:
        target: a run folder, or an earlier `output`; else a model, or its name on the server
            `endpoint`.
        overrides: `evaluate.key=value`; for a model also `precision=...` and `seed=...`.

    Returns:
        The folder of the results.
    """
    folder = Path(target)
    if is_run(folder) or is_evaluation(folder):
        if reference or endpoint or output:
            raise RecipeError(
                f"{target} is a run folder: --reference, --endpoint and --output are for other "
                "models"
            )
        if is_run(folder):
            with hold(folder, "run"):
                set_evaluation(Run(folder), overrides)
                evaluate_run(Run(folder))
            return folder
        tree = read_recipe(folder / EVALUATION)[1]
    elif output is None:
        raise RecipeError(
            f"{target} is not a run folder: name the folder to write with --output to measure it "
            "as a model"
        )
    else:
        folder = output
        base = None if endpoint else adapter_base(resolve(target))
        model = {"url": endpoint, "model": target} if endpoint else target
        tree = {"model": model, "reference": reference or base}
        check_folder(folder, "evaluation")
        _check_model(folder, tree)
        if is_evaluation(folder):
            tree["chat"] = read_recipe(folder / EVALUATION)[1].get("chat")
    for override in overrides:
        set_value(tree, override)
    what = validate(Evaluation, tree, "evaluation")
    for source in (what.model, what.reference):
        if isinstance(source, str):
            trust(source, what.trust_remote_code)
    chat = None
    if isinstance(what.model, str):
        chat = Chat(load_tokenizer(what.model), settings=what.chat)
    check_evaluation(what.evaluate, chat)
    what = what.model_copy(update={"chat": chat.settings if chat else what.chat})
    with hold(folder, "evaluation"):
        write_whole(folder / ENVIRONMENT, json.dumps(environment(what.seed), indent=1))
        write_whole(folder / EVALUATION, dump(what.model_dump(mode="json")))
        evaluate_folder(folder, what)
    return folder


def _check_model(folder: Path, tree: dict[str, Any]) -> None:
    there = read_recipe(folder / EVALUATION)[1] if is_evaluation(folder) else tree
    for field, here in tree.items():
        found = there[field]
        if field == "model" and isinstance(found, dict):
            found = {key: found[key] for key in ("url", "model")}
        if found != here:
            raise RecipeError(
                f"{folder} holds an evaluation of another {field} ({found!r}); choose another "
                "--output"
            )


def set_evaluation(run: Run, overrides: list[str]) -> None:
    """Changes what a run's recipe measures; `overrides`: `evaluate.key=value` or `key=value`."""
    if not is_run(run.folder):
        raise RecipeError(f"{run.folder}: not a run folder (it has no recipe.yaml)")
    if overrides:
        keys = [
            o if o.startswith(("evaluate.", "trust_remote_code=")) else f"evaluate.{o}"
            for o in overrides
        ]
        recipe = stored_recipe(run.folder / RECIPE, keys)
        trust(recipe.model, recipe.trust_remote_code)
        # A source that does not exist must not get into the recipe.
        check_evaluation(evaluation(recipe), chat_of(recipe))
        write_whole(run.folder / RECIPE, dump_recipe(recipe))


@quiet_libraries()
def evaluate_run(run: Run) -> dict[str, Any]:
    """Measures the reference and the tuned model of a run; keeps what is already measured."""
    if not run.trained:
        raise RecipeError(f"{run.folder}: no trained model in it; `ringfence train` comes first")
    recipe = run.recipe
    for source in (recipe.model, str(run.weights)):
        trust(source, recipe.trust_remote_code)
    if recipe.data.held_out:
        about = read_environment(run.folder / ENVIRONMENT, ANOTHER)
        if about.get("held_out") != held_out_digest(recipe):
            raise RecipeError(
                f"{run.folder}: {recipe.data.train} has changed since training, so which rows were "
                "held out is not known; restore the file, or set data.held_out to 0 in the run's "
                "recipe.yaml"
            )
    what = Evaluation(
        model=str(run.weights),
        reference=recipe.model,
        precision=recipe.train.precision,
        trust_remote_code=recipe.trust_remote_code,
        seed=recipe.seed,
        chat=chat_of(recipe).settings,
        evaluate=evaluation(recipe),
    )
    with hold(run.folder, "run"):
        return evaluate_folder(run.folder, what)
