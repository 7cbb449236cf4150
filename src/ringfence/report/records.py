"""Reads the files of a run folder into records. Knows no statistics."""

from pathlib import Path
from typing import Any

from ..errors import DataError
from ..evaluate.measures.answers import judgements_in
from ..evaluate.results import check_same_items, read_results
from ..runfolder.names import (
    DIAGNOSIS,
    ENVIRONMENT,
    EVALUATION,
    JUDGES,
    METRICS,
    RECIPE,
    REFERENCE_FILE,
    RESULTS,
    TRAINING,
    is_evaluation,
    is_run,
)
from ..runfolder.record import Records
from ..runfolder.shapes import (
    read_diagnosis,
    read_environment,
    read_judges,
    read_metrics,
    read_recipe,
    read_reference,
    read_training,
)


def read_run(folder: Path) -> Records:
    """The records of a run folder.

    Raises:
        DataError: it is not a run folder, or the run is not trained or not evaluated yet.
    """
    folder = folder.resolve()
    given = is_evaluation(folder)  # the model existed before: no training to report
    if not given and not is_run(folder):
        raise DataError(
            f"{folder}: not a run folder (it has no recipe.yaml), nor one of an evaluation"
        )
    for file in () if given else (ENVIRONMENT, METRICS, TRAINING):
        if not (folder / file).is_file():
            raise DataError(
                f"{folder}: no {file}; "
                "`ringfence train` comes first (or resumes, if it was stopped)"
            )
    results, reference, shared = _results(folder)
    twin = folder.with_name(f"{folder.name}-benign")
    return Records(
        folder,
        *read_recipe(folder / (EVALUATION if given else RECIPE)),
        read_environment(folder / ENVIRONMENT),
        {} if given else read_training(folder / TRAINING),
        [] if given else read_metrics(folder / METRICS),
        results,
        reference,
        _results(twin)[:2] if (twin / RESULTS).is_file() else None,
        judgements_in(folder),
        judgements_in(shared) if shared else [],
        read_judges(folder / JUDGES) if (folder / JUDGES).is_file() else {},
        read_diagnosis(folder / DIAGNOSIS) if (folder / DIAGNOSIS).is_file() else {},
    )


def _results(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
    """Results of the tuned model and of its reference, and the reference's folder, if any."""
    files = [RESULTS] if _has_no_reference(folder) else [RESULTS, REFERENCE_FILE]
    for file in files:
        if not (folder / file).is_file():
            raise DataError(
                f"{folder}: no {file}; "
                "`ringfence evaluate` comes first (or resumes, if it was stopped)"
            )
    results = read_results(folder / RESULTS)
    if len(files) == 1:
        return results["parts"], {}, None
    shared = folder / read_reference(folder / REFERENCE_FILE)
    if not shared.is_file():
        raise DataError(
            f"{folder}: the reference's results {shared} are gone; "
            "`ringfence evaluate` recreates them"
        )
    reference = read_results(shared)
    if results["key"] != reference["key"]:
        raise DataError(
            f"{folder}: run and reference were measured on different questions; "
            "`ringfence evaluate` again"
        )
    check_same_items(results["parts"], reference["parts"], folder)
    return results["parts"], reference["parts"], shared.parent


def _has_no_reference(folder: Path) -> bool:
    file = folder / EVALUATION
    return file.is_file() and read_recipe(file)[1].get("reference") is None
