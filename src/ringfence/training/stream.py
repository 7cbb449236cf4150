"""The order of training: which rows are in which batch of which epoch.

It depends on the seed alone, so a resumed run sees exactly the rows of an uninterrupted one.
"""

import math
import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Dataset, Sampler

from ..defenses.base import Defense
from ..errors import RecipeError
from ..text.batch import Bundle, Example


class TrainStream(Dataset[Bundle]):
    """Training rows in order, with the extra retain rows that defenses need.

    Args:
        examples: the user's rows.
        retain: rows to draw extra rows from.
        defenses: may change the rows of an epoch, and set the number of extra retain rows.
        step_rows: training rows in one optimiser step, over accumulation and ranks.
        seed: of order and draws.
    """

    def __init__(
        self,
        examples: list[Example],
        retain: list[Example],
        defenses: Sequence[Defense],
        step_rows: int,
        seed: int,
    ) -> None:
        self.examples, self.retain, self.defenses = examples, retain, list(defenses)
        self.step_rows, self.seed = step_rows, seed
        for defense in self.defenses:
            if 0 < defense.riders * step_rows < 1:
                raise RecipeError(
                    f"defenses.{defense.name}: {defense.riders} retain rows per training row is "
                    f"less than one in a step of {step_rows} rows; raise retain_ratio, "
                    "train.batch_size or train.accumulation"
                )
        self.set_epoch(0)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.rows) / self.step_rows)

    def set_epoch(self, epoch: int) -> None:
        """Draws the rows of an epoch and their order. Called by the data loader."""
        rng = random.Random(f"{self.seed}-{epoch}")
        rows = self.examples
        for defense in self.defenses:
            rows = defense.change_data(rows, rng)
        self.rows = self._ordered(rows, rng)
        self.riders = self._ride(epoch, rng)

    def _ordered(self, rows: list[Example], rng: random.Random) -> list[Example]:
        """Shuffled; in windows of eight steps, similar lengths are grouped, which saves padding."""
        rows = rng.sample(rows, len(rows))
        ordered: list[Example] = []
        for start in range(0, len(rows), 8 * self.step_rows):
            window = sorted(rows[start : start + 8 * self.step_rows], key=len)
            steps = [
                window[at : at + self.step_rows] for at in range(0, len(window), self.step_rows)
            ]
            short = [steps.pop()] if len(steps[-1]) < self.step_rows else []
            for step in rng.sample(steps, len(steps)) + short:
                ordered += step
        return ordered

    def _ride(self, epoch: int, rng: random.Random) -> list[list[Example]]:
        """Extra retain rows for each row, spread evenly; one or more in every step that needs any.

        Those of a step have similar lengths, which saves padding. DeepSpeed pads them together with
        the rows, so the longest go with the longest.
        """
        wanting = [defense for defense in self.defenses if defense.riders]
        due = []
        for place in range(len(self.rows)):
            step = epoch * self.steps_per_epoch + place // self.step_rows
            ratio = max((d.riders for d in wanting if step % d.every == 0), default=0.0)
            within = place % self.step_rows
            due.append(_whole(ratio, within + 1) - _whole(ratio, within))
        drawn: list[Example] = []
        while len(drawn) < sum(due):
            drawn += rng.sample(self.retain, min(len(self.retain), sum(due) - len(drawn)))
        drawn.sort(key=len)
        steps = [
            range(len(self.rows))[at : at + self.step_rows]
            for at in range(0, len(self.rows), self.step_rows)
        ]
        riders: list[list[Example]] = [[] for _ in self.rows]
        steps.sort(key=lambda places: -max(len(self.rows[place]) for place in places))
        for step_places in steps:
            for place in step_places:
                riders[place] = [drawn.pop() for _ in range(due[place])]
        return riders

    def added(self) -> list[str]:
        """The origins of the rows that defenses added to this epoch."""
        own = {example.origin for example in self.examples}
        return [example.origin for example in self.rows if example.origin not in own]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Bundle:
        return [(self.rows[place], False)] + [(rider, True) for rider in self.riders[place]]


class RankBatches(Sampler[list[int]]):
    """Places in the stream of one rank's batches; a step has the rows it would have on one process.

    Every rank has the same number of batches. Those of the last step of an epoch may be smaller, or
    empty if it has fewer rows than there are ranks.

    Args:
        stream: read again for each epoch; has step_rows = rows * accumulation * world.
        rows: in a full batch.
    """

    def __init__(self, stream: TrainStream, rows: int, rank: int, world: int) -> None:
        self.stream, self.rows, self.rank, self.world = stream, rows, rank, world

    def __len__(self) -> int:
        return math.ceil(len(self.stream) / (self.rows * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        together = self.rows * self.world
        for start in range(0, len(self.stream), together):
            # Neighbours have similar lengths, so taking turns keeps ranks equally busy.
            end = min(start + together, len(self.stream))
            yield list(range(start, end))[self.rank :: self.world]


def _whole(ratio: float, rows: int) -> int:
    """Extra rows due after `rows` rows of a step, one with the first; rounding must not add one."""
    return math.ceil(ratio * rows - 1e-9)
