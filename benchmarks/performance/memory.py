"""Peak memory of each way of training, against plain fine-tuning. Every measurement has its own
process.

    python benchmarks/performance/memory.py               # the embedded model; about 9 minutes
                                                          # on two CPU cores
    python benchmarks/performance/memory.py --shape 8b    # an accelerator

Each process trains a few steps on the same rows. The peak is that of resident memory (VmHWM), or on
an accelerator of its allocator, from the first step on; `above` is the difference from the freshly
loaded model. On a CPU two processes of one thread run at a time. A figure is the median over
processes, its spread the quartiles.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, KL, SHAPES, Arm, Workload  # type: ignore[import-not-found]
from record import RESULTS, save, spread  # type: ignore[import-not-found]

from ringfence.util.machine import peak_memory, reset_peak_memory

FULL = {"method": "full"}
CACHED = {"reference_cache": "states"}
NOT_MEASURED = ("plain, shared prefix", "plain, packing", "kl every 4", "kl every 8", "interleave")
MEASURED: dict[str, Arm] = {name: arm for name, arm in ARMS.items() if name not in NOT_MEASURED} | {
    "full": Arm(train=FULL),
    "full, kl": Arm(train=FULL, defenses=KL, against="full"),
    "full, kl, cached states": Arm(train=FULL | CACHED, defenses=KL, against="full"),
}
BOUND = 1.1


def peak(name: str, workload: Workload) -> dict[str, float]:
    """GiB: with the model loaded, and at the peak of training."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = workload.trainer(MEASURED[name], Path(folder))
        reset_peak_memory()  # to what is in use now
        loaded = peak_memory()
        trainer.train()
        return {"loaded": loaded / 2**30, "peak": peak_memory() / 2**30}


def in_process(name: str, given: argparse.Namespace) -> dict[str, float]:
    """`peak`, in a new process."""
    command = [sys.executable, __file__, "--one", name, "--shape", given.shape]
    command += [
        "--steps",
        str(given.steps),
        "--batch",
        str(given.batch),
        "--tokens",
        str(given.tokens),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    print(f"{name}: {done.stdout.strip()}", flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(peaks: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """For each arm: GiB in all and above the loaded model, and the medians' ratios to its
    comparison arm."""
    found: dict[str, Any] = {}
    for name, measured in peaks.items():
        total = spread([one["peak"] for one in measured])
        above = spread([one["peak"] - one["loaded"] for one in measured])
        found[name] = {"total": total, "above": above}
    for name, arm in found.items():
        against = MEASURED[name].against
        if against in found and against != name:
            ratios = {
                part: round(arm[part]["median"] / found[against][part]["median"], 3) for part in arm
            }
            bound = BOUND if MEASURED[name].defenses else None
            arm |= {"against": against, "ratio": ratios, "bound": bound}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=["default", *SHAPES], default="default")
    parser.add_argument("--arms", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--processes", type=int, default=3, help="for each arm")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="in a random row")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measurements")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        workload = Workload(given.shape, given.batch, given.tokens, given.steps)
        print(json.dumps(peak(given.one, workload)))
        return
    jobs = [name for _ in range(given.processes) for name in given.arms]
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else 2) as pool:
        measured = list(pool.map(lambda name: in_process(name, given), jobs))
    peaks = {name: [one for job, one in zip(jobs, measured) if job == name] for name in given.arms}
    found = summary(peaks)
    setting = {"shape": given.shape, "steps": given.steps, "batch": given.batch}
    save(given.results / f"memory-{given.shape}.json", {**setting, "arms": found})
    for name, arm in found.items():
        print(
            f"{name:24} {arm['total']['median']:.2f} GiB, above {arm['above']['median']:.2f} "
            f"{arm.get('ratio', '')}"
        )


if __name__ == "__main__":
    main()
