"""Every file and folder of a run, by name, and where its weights are. Knows nothing of what is in them."""

from pathlib import Path

RECIPE = "recipe.yaml"  # of a run; of a model that was only measured EVALUATION is in its place
EVALUATION = "evaluation.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
TRAINING = "training.json"  # is there when the run is trained
CARRIERS = "carriers.json"
PILOT = "pilot"
CHECKPOINTS = "checkpoints"
ADAPTER, MODEL = "adapter", "model"

RESULTS = "results.json"
REFERENCE, REFERENCE_FILE = "reference", "reference.json"  # what was found of it; where that is
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
    """What a run folder has of trained weights: an adapter or a whole model; None where there is neither."""
    return next((place for place in (folder / ADAPTER, folder / MODEL) if place.is_dir()), None)
