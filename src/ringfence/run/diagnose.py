"""Looks inside tuned models."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import RecipeError
from ..model.default import resolve
from ..model.files import adapter_base, trust
from ..runfolder.folder import hold
from ..runfolder.names import is_run
from ..util.quiet import quiet_libraries
from .config import Recipe
from .prepare import subject_of
from .record import Run


@quiet_libraries()
def diagnose_targets(
    targets: Sequence[str],
    names: Sequence[str] = (),
    base: str | None = None,
    reference: str | None = None,
    output: Path | None = None,
    questions: int = 24,
) -> Path:
    """Looks inside tuned models and compares them in tables and figures (see `diagnose_folder`).

    Args:
        targets: trained run folders, or models (folders, hub ids, adapters), which need `output`.
        names: diagnoses; default: all.
        base: the pre-trained model before its alignment.
        reference: default: what the runs or the adapters were made from.
        output: default: the first run's folder.
        questions: number of paired questions of the training domain, and of other domains and
            values. They, and the training rows, come from the first run's recipe.

    Returns:
        The folder of the results.

    Raises:
        RecipeError: no tuned model, output or reference is given, or the runs have different
            references.
    """
    from ..diagnose.folder import diagnose_folder

    if not targets:
        raise RecipeError("diagnose: name a run folder or a tuned model")
    runs = {target: Run(Path(target)) for target in targets if is_run(Path(target))}
    for run in runs.values():
        if not run.trained:
            raise RecipeError(
                f"{run.folder}: no trained model in it; `ringfence train` comes first"
            )
    folder = output or (runs[targets[0]].folder if targets[0] in runs else None)
    if folder is None:
        raise RecipeError(
            f"{targets[0]} is not a run folder: name the folder to write with --output"
        )
    for run in runs.values():
        for source in (run.recipe.model, str(run.weights)):
            trust(source, run.recipe.trust_remote_code)
    recipe = runs[targets[0]].recipe if targets[0] in runs else Recipe()
    reference = reference or _reference_of(targets, runs)
    weights = [str(runs[t].weights) if t in runs else t for t in targets]
    tuned = dict(zip(_names_of(targets), weights))
    with hold(folder, "diagnosis"):
        diagnose_folder(folder, subject_of(recipe, reference, tuned, base, questions), names)
    return folder


def _reference_of(targets: Sequence[str], runs: dict[str, Run]) -> str:
    """What all tuned models were made from."""
    found = {t: runs[t].recipe.model if t in runs else adapter_base(resolve(t)) for t in targets}
    unknown = [target for target, model in found.items() if model is None]
    if unknown:
        raise RecipeError(
            f"{unknown[0]}: what was it made from? Name its reference with --reference"
        )
    if len(set(found.values())) > 1:
        raise RecipeError(
            f"the tuned models were made from different ones: {found}; diagnose them one by one"
        )
    return str(found[targets[0]])


def _names_of(targets: Sequence[str]) -> list[str]:
    """A name for each tuned model: its folder's, with the parent folder's if two are the same."""
    short = [Path(target).name for target in targets]
    names = [
        name if short.count(name) == 1 else "/".join(Path(t).parts[-2:])
        for t, name in zip(targets, short)
    ]
    if len(set(names)) < len(names):
        raise RecipeError(f"diagnose: expected different models, found {', '.join(targets)}")
    return names
