"""A run, from recipe to results, in one folder.

Each stage reads the folder, does what is missing, and writes there: recipe.yaml, environment.json,
metrics.jsonl, training.json, adapter/ (or model/), and the files of an evaluation.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from ..defenses import DefenseConfig, Defenses
from ..evaluate.config import EvaluateConfig
from ..processes import is_main
from ..runfolder.folder import hold
from ..training.ranks import join, leave, main_first
from ..util.quiet import quiet_libraries
from .benign import benign_twin
from .config import Recipe, parse_recipe
from .evaluate import evaluate_run
from .prepare import prepare
from .record import Run
from .train import train_run


@quiet_libraries()
def fine_tune(
    train: str,
    *,
    defenses: Sequence[DefenseConfig] | Literal["auto"] = (),
    model: str = "default",
    output: str = "runs/run",
    retain: str | None = "shipped:retain",
    seed: int = 0,
    evaluate: bool | dict[str, Any] | EvaluateConfig = True,
    **options: Any,
) -> Run:
    """Fine-tunes a model with defenses and measures it.

    Args:
        train: source of the rows: a local file, a hub id, `shipped:NAME`.
        defenses: any set, e.g. `[KL(weight=0.3), Interleave(ratio=0.1)]`; "auto" = a scope with
            KL inside.
        retain: source of safe rows for defenses that need them.
        evaluate: what is measured: fields of the recipe's `evaluate`, as a dict or an
            `EvaluateConfig`; True = the defaults; False = nothing (`ringfence evaluate` does it
            later).
        options: fields of `train` in the recipe, e.g. `epochs=2, learning_rate=3e-4`.

    Raises:
        RingfenceError: whatever is wrong with the input, before training starts.
    """
    measured: bool | dict[str, Any] | EvaluateConfig = evaluate
    if isinstance(evaluate, EvaluateConfig):
        measured = evaluate.model_dump(exclude_unset=True)
    recipe = parse_recipe(
        {
            "model": model,
            "output": output,
            "seed": seed,
            "data": {"train": train, "retain": retain},
            "train": options,
            "defenses": defenses
            if isinstance(defenses, str)
            else Defenses.of(list(defenses)).model_dump(exclude_none=True),
            "evaluate": {} if isinstance(measured, bool) else measured,
        }
    )
    return train_run(recipe) if evaluate is False else run_recipe(recipe)


@quiet_libraries()
def run_recipe(recipe: Recipe) -> Run:
    """Trains and measures a run, and its benign twin if the recipe has one.

    With several ranks only the main process measures, after all training.
    """
    join()
    with ExitStack() as held:
        with main_first():
            held.enter_context(hold(Path(recipe.output), "run"))
            if recipe.evaluate.benign:
                prepare(benign_twin(recipe))
        run = train_run(recipe)
        trained = [run, train_run(benign_twin(recipe))] if recipe.evaluate.benign else [run]
        leave()
        if is_main():
            for each in trained:
                evaluate_run(each)
    return run
