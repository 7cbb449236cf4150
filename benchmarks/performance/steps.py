"""Time of an optimiser step in each way to train, against plain fine-tuning in the same alternating series.

    python benchmarks/performance/steps.py                # the embedded model on CPU; about 10 minutes on two cores
    python benchmarks/performance/steps.py --shape 8b     # the shape of Llama 3.1 8B, random weights; an accelerator
    python benchmarks/performance/steps.py --shape small --rounds 1 --arms plain treft

All arms train side by side in one process, each its own adapter on the same frozen weights, and take turns. A turn is
two steps, of which the second counts: the first meets the memory that another arm has left, too small or too large. A
ratio is that of two steps on the same rows, a figure the median over rounds, its spread the quartiles. Arms that act on
every k-th step stand in a second series, in whose turns as many steps count as it takes for each to act equally often.
"""

import argparse
import gc
import json
import math
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, SHAPES, Workload  # type: ignore[import-not-found]
from record import RESULTS, save, spread  # type: ignore[import-not-found]
from transformers import TrainerCallback

from ringfence.trainer import DefendedTrainer

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class SteppedTraining:
    """`trainer.train()`, in a thread of its own that stands still after each step until it is asked for the next."""

    def __init__(self, trainer: DefendedTrainer, clock: Callable[[], float]) -> None:
        self.trainer, self._clock = trainer, clock
        self._error: BaseException | None = None
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        trainer.add_callback(_AtStepEnd(self._pause))
        self._stopped = False
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def step(self) -> float:
        """Seconds that the next step takes, from fetching its rows to its line in the log."""
        started = self._clock()
        self._go.release()
        self._done.acquire()
        if self._error:
            raise self._error
        return self._clock() - started

    def stop(self) -> None:
        self._stopped = True
        self._go.release()
        self._thread.join()

    def _pause(self, control: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._done.release()
        self._go.acquire()
        control.should_training_stop = self._stopped

    def _train(self) -> None:
        self._go.acquire()
        try:
            self.trainer.train()
        except BaseException as error:
            self._error = error
            self._done.release()


class _AtStepEnd(TrainerCallback):
    def __init__(self, act: Callable[[Any], None]) -> None:
        self._act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._act(control)


def series(names: list[str], workload: Workload, rounds: int, cycle: int, clock: str) -> dict[str, list[float]]:
    """Seconds of a step, by arm and round; `cycle` steps of a turn are counted."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        arms = {}
        for name in names:
            trainer = workload.trainer(ARMS[name], Path(folder) / name)
            if arms:
                _share_frozen(trainer.model, next(iter(arms.values())).trainer.model)
            arms[name] = SteppedTraining(trainer, CLOCKS[clock])
        for name, arm in arms.items():
            print(f"{name}: first step {arm.step():.2f} s", flush=True)
        for number in range(rounds):
            turn = number % len(names)  # no arm always comes first
            for name in names[turn:] + names[:turn]:
                arms[name].step()
                seconds[name].append(sum(arms[name].step() for _ in range(cycle)) / cycle)
            print(f"round {number + 1} of {rounds}", flush=True)
        for arm in arms.values():
            arm.stop()
    gc.collect()  # trainers and models refer to each other
    return seconds


def _share_frozen(model: Any, first: Any) -> None:
    """What no arm trains is in memory once."""
    for ours, theirs in zip(model.parameters(), first.parameters(), strict=True):
        if not ours.requires_grad:
            ours.data = theirs.data


def summary(seconds: dict[str, list[float]], checkpointing: bool, rho: float) -> dict[str, Any]:
    """For each arm: seconds of a step, ratio to the arm that it is measured against, bound."""
    found: dict[str, Any] = {}
    for name, taken in seconds.items():
        arm = ARMS[name]
        found[name] = {"seconds": spread(taken)}
        if arm.against in seconds and arm.against != name:
            ratios = [ours / theirs for ours, theirs in zip(taken, seconds[arm.against])]
            bound = round(arm.bound(6 if checkpointing else 4, rho), 3) if arm.bound else None
            found[name] |= {"against": arm.against, "ratio": spread(ratios), "bound": bound}
    return found


def retain_share(workload: Workload) -> float:
    """Retain tokens for each training token, with the default ratio of rows."""
    with tempfile.TemporaryDirectory() as folder:
        stream = workload.trainer(ARMS["kl on retain rows"], Path(folder)).train_dataset
    riders = sum(len(rider) for riders in stream.riders for rider in riders)  # type: ignore[union-attr]
    return riders / sum(len(row) for row in stream.rows)  # type: ignore[union-attr]


def measure(names: list[str], workload: Workload, rounds: int, cycles: int, clock: str) -> dict[str, Any]:
    """Both series, as far as the named arms want them."""
    found: dict[str, Any] = {}
    rho = retain_share(workload) if any("retain" in name for name in names) else 0.0
    at_once = [name for name in names if ARMS[name].every == 1]
    in_cycles = [name for name in names if ARMS[name].every > 1]
    if at_once:
        found |= summary(series(at_once, workload, rounds, 1, clock), workload.checkpointing, rho)
    if in_cycles:
        cycle = math.lcm(*(ARMS[name].every for name in in_cycles))
        cycled = summary(series(["plain", *in_cycles], workload, cycles, cycle, clock), workload.checkpointing, rho)
        found |= {name: cycled[name] for name in in_cycles}
    return {"retain tokens per training token": round(rho, 3), "arms": found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=["default", *SHAPES], default="default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cycles", type=int, default=5, help="rounds of the second series")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--batch", type=int, help="rows in a step; default: 8, of the 8b shape 2")
    parser.add_argument("--tokens", type=int, help="in a random row; default: 2,048, of the small shape 128")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in every arm")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a machine that others use too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measurements")
    given = parser.parse_args()
    every = math.lcm(*(ARMS[name].every for name in given.arms))
    workload = Workload(
        given.shape,
        given.batch or (2 if given.shape == "8b" else 8),
        given.tokens or (128 if given.shape == "small" else 2048),
        # The first is warm-up, the last is not taken.
        max(2 * given.rounds, given.cycles * (every + 1) if every > 1 else 0) + 2,
        given.checkpointing,
    )
    found = measure(given.arms, workload, given.rounds, given.cycles, given.clock)
    setting = {"clock": given.clock, "batch": workload.batch, "checkpointing": given.checkpointing}
    if given.shape != "default":
        setting["tokens"] = workload.tokens
    save(given.results / f"steps-{given.shape}.json", {"shape": given.shape, **setting, **found})
    for name, arm in found["arms"].items():
        print(
            f"{name:24} {arm['seconds']['median']:.3f} s " + json.dumps(arm.get("ratio", "")) + f" {arm.get('bound')}"
        )


if __name__ == "__main__":
    main()
