"""One run: its folder, and what it contains."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluate.results import read_results
from ..report.records import read_run
from ..report.summary import Summary, summarise
from ..runfolder.names import ADAPTER, MODEL, RECIPE, RESULTS, TRAINING
from ..runfolder.shapes import read_training
from .config import Recipe, stored_recipe


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def recipe(self) -> Recipe:
        return stored_recipe(self.folder / RECIPE)

    @property
    def trained(self) -> bool:
        file = self.folder / TRAINING
        return file.is_file() and bool(read_training(file))

    @property
    def weights(self) -> Path:
        """What was trained: the folder of the adapter, or of the whole model."""
        return self.folder / (ADAPTER if self.recipe.train.method == "lora" else MODEL)

    def results(self) -> dict[str, Any]:
        """The measurements of the tuned model (see `evaluate_model`)."""
        return read_results(self.folder / RESULTS)

    def summary(self, control: "Run | None" = None) -> Summary:
        """The numbers of this run in the report: shifts with their intervals, fluency and cost.

        With `control`, the sound control, effects too.
        """
        return summarise(read_run(self.folder), read_run(control.folder) if control else None)
