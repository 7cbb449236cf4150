"""Names of a run's files and folders, and where its weights are. Does not know what they hold."""

from pathlib import Path

RECIPE = "recipe.yaml"  # of a run; a model that was only measured has EVALUATION instead
EVALUATION = "evaluation.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
TRAINING = "training.json"  # there once the run is trained
CARRIERS = "carriers.json"
PILOT = "pilot"
CHECKPOINTS = "checkpoints"
ADAPTER, MODEL = "adapter", "model"

RESULTS = "results.json"
REFERENCE, REFERENCE_FILE = "reference", "reference.json"  # its results; where they are
ANSWERS, JUDGED, JUDGES = "answers.jsonl", "judged.jsonl", "judges.json"
DIAGNOSIS, FIGURES = "diagnosis.json", "figures"

COMPARED = "compared.json"
GATE = "gate.json"
PAGE = "report.html"


def is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file()


def is_evaluation(folder: Path) -> bool:
    return (folder / EVALUATION).is_file()


def weights_in(folder: Path) -> Path | None:
    """The trained weights in a run folder: an adapter or a whole model; None if there are none."""
    return next((place for place in (folder / ADAPTER, folder / MODEL) if place.is_dir()), None)
