"""Time of an optimiser step in each way of training, alternating with plain fine-tuning.

    python benchmarks/performance/steps.py                # the embedded model; about 50 minutes
    python benchmarks/performance/steps.py --shape 8b     # Llama 3.1 8B's shape; an accelerator
    python benchmarks/performance/steps.py --shape small --sittings 1 --rounds 1 --arms treft

Models other than the embedded one have random weights. In a sitting, an arm and its comparison arm
train side by side, each in its own process, and take turns; each round begins with the arm that
ended the previous one. A turn is two steps, of which the second counts: the first finds caches
cold. For an arm that acts on every k-th step, k steps count. A ratio is that of two steps on the
same rows; a figure is the median over all rounds of all sittings, its spread the quartiles. Several
sittings are needed because equal processes differ: depending on where its memory is, the same arm
was up to 4 % slower than itself throughout a sitting.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Processes are forked after the slow imports; the check for a GPU must not start its driver before.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
from arms import ARMS, SHAPES, Workload  # type: ignore[import-not-found]
from record import RESULTS, save, spread  # type: ignore[import-not-found]
from transformers import TrainerCallback

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class SteppedTraining:
    """`trainer.train()` of an arm, in a process that waits after each step until it is asked for
    the next one."""

    def __init__(self, name: str, workload: Workload, clock: str) -> None:
        fork = multiprocessing.get_context("fork")
        self._pipe, theirs = fork.Pipe()
        self._process = fork.Process(
            target=_train, args=(name, workload, clock, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def step(self) -> float:
        """Seconds of the next step, from fetching its rows to its line in the log."""
        self._pipe.send(True)
        return self._pipe.recv()

    def stop(self) -> None:
        self._pipe.send(False)
        self._process.join()


def _train(name: str, workload: Workload, clock: str, pipe: Connection) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = workload.trainer(ARMS[name], Path(folder))
        trainer.add_callback(_WhenAsked(pipe, CLOCKS[clock]))
        trainer.train()


class _WhenAsked(TrainerCallback):
    def __init__(self, pipe: Connection, clock: Callable[[], float]) -> None:
        self._pipe, self._clock = pipe, clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._pipe.recv()
        self._started = self._clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._pipe.send(self._clock() - self._started)
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()  # the other process needs the memory
        control.should_training_stop = not self._pipe.recv()
        self._started = self._clock()


def sitting(
    names: tuple[str, str], workload: Workload, rounds: int, clock: str
) -> dict[str, list[float]]:
    """Seconds of a step of two arms, by round."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    counted = max(ARMS[name].every for name in names)
    arms = {name: SteppedTraining(name, workload, clock) for name in names}
    for arm in arms.values():
        arm.step()  # one-time setup
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            arms[name].step()
            seconds[name].append(sum(arms[name].step() for _ in range(counted)) / counted)
    for arm in arms.values():
        arm.stop()
    return seconds


def measure(
    names: list[str], workload: Workload, sittings: int, rounds: int, clock: str
) -> dict[str, Any]:
    """For each arm: seconds of a step, ratio to its comparison arm, bound."""
    with tempfile.TemporaryDirectory() as folder:
        rho = workload.retain_share(Path(folder))
    found: dict[str, Any] = {}
    for name in names:
        arm = ARMS[name]
        taken: dict[str, list[float]] = {arm.against: [], name: []}
        for _ in range(sittings):
            for each, seconds in sitting((arm.against, name), workload, rounds, clock).items():
                taken[each] += seconds
        ratios = [ours / theirs for ours, theirs in zip(taken[name], taken[arm.against])]
        bound = round(arm.bound(6 if workload.checkpointing else 4, rho), 3) if arm.bound else None
        found[name] = {
            "against": arm.against,
            "seconds": {each: spread(taken[each]) for each in taken},
            "ratio": spread(ratios),
            "bound": bound,
        }
        print(f"{name:26} " + json.dumps(found[name]["ratio"]), flush=True)
    return {"retain tokens per training token": round(rho, 3), "arms": found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=["default", *SHAPES], default="default")
    parser.add_argument("--sittings", type=int, default=4, help="of each arm")
    parser.add_argument("--rounds", type=int, default=3, help="of a sitting")
    arms = [name for name in ARMS if name != "plain"]
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms)
    parser.add_argument("--batch", type=int, help="rows in a step; default: 8, for the 8b shape 2")
    parser.add_argument(
        "--tokens", type=int, help="in a random row; default: 2,048, for the small shape 128"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="activation checkpointing in every arm"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a shared machine")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measurements")
    given = parser.parse_args()
    every = max(ARMS[name].every for name in given.arms)
    workload = Workload(
        given.shape,
        given.batch or (2 if given.shape == "8b" else 8),
        given.tokens or (128 if given.shape == "small" else 2048),
        given.rounds * (every + 1) + 2,  # the first is warm-up, the last is not taken
        given.checkpointing,
    )
    found = measure(given.arms, workload, given.sittings, given.rounds, given.clock)
    setting = {"clock": given.clock, "batch": workload.batch, "checkpointing": given.checkpointing}
    if given.shape != "default":
        setting["tokens"] = workload.tokens
    save(given.results / f"steps-{given.shape}.json", {"shape": given.shape, **setting, **found})


if __name__ == "__main__":
    main()
