"""Cost of training: time against the undefended run's, and memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...runfolder.record import Runs
from ...stats import number
from .base import Cell, Measurement, Number


@dataclass(frozen=True)
class Spent:
    """Seconds and GiB of training; `ratio` = time over the undefended run's (1.0 for itself).
    `compared` = there is an undefended run other than this one."""

    seconds: float
    memory_gib: float
    ratio: float | None
    compared: bool


class TrainingCost(Measurement):
    """What training took; nothing is asked of the model."""

    names = ("time_ratio",)

    def read(self, runs: Runs) -> Spent | None:
        training = runs.run.training
        if not training:  # the model was not trained here
            return None
        seconds, memory = training["seconds"], training["peak_memory_gib"]
        of = runs.timed.training if runs.timed else {}
        ratio = seconds / of["seconds"] if of else None
        return Spent(seconds, memory, ratio, runs.undefended is not None)

    def numbers(self, found: Spent) -> Iterator[Number]:
        place: dict[str, Any] = {"level": "run", "item": "training"}
        if found.ratio is not None:
            name = "time_ratio" if found.compared else None
            yield Number(
                name, found.ratio, "ratio", "time_ratio", **place, side="value", listed=False
            )
        for what, value in (("seconds", found.seconds), ("memory_gib", found.memory_gib)):
            yield Number(None, value, "ratio", what, **place, side="value")

    def cells(self, found: Spent) -> Iterator[Cell]:
        seconds = (f"{found.seconds:.0f} s",)
        yield Cell("cost: time x", number(found.ratio) if found.ratio else "", notes=seconds)
        yield Cell("cost: peak memory, GiB", number(found.memory_gib))

    def legend(self, found: list[Spent]) -> str:
        return "time x: against the undefended run."


MEASUREMENT = TrainingCost()
