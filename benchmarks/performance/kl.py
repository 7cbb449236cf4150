"""KL between two models' next-token distributions from their final hidden states: tiles against the
naive form.

    python benchmarks/performance/kl.py    # 2,048 tokens, 151,936 words: minutes on two CPU cores
    python benchmarks/performance/kl.py --tile-bits 22 26

Forward and backward of KL(student || reference), with a frozen head, as in a LoRA run. The ways
take turns; a ratio is that of two turns of one round; a figure is the median over rounds, its
spread the quartiles. Before anything is timed, each way's value and gradient must agree with the
naive form. Extra memory is the peak above that of the inputs, each in its own process. TRL's
chunked kernel (beta 1 is this KL) and Liger's fused JSD (likewise) are included if they run. Writes
kl.json into the folder of the measurements.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from record import RESULTS, save, spread  # type: ignore[import-not-found]
from torch import Tensor, nn

from ringfence.model import losses
from ringfence.model.losses import CrossEntropy, Divergence, Head, States
from ringfence.util.machine import peak_memory, reset_peak_memory

DEVICE = torch.device("cpu")
if torch.accelerator.is_available():
    DEVICE = torch.accelerator.current_accelerator()
TILE = losses.TILE_ELEMENTS
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16


@dataclass
class Inputs:
    """Student and reference [N, D], the targets [N], and the head of both."""

    student_ND: Tensor
    reference_ND: Tensor
    target_N: Tensor
    head: Head

    @property
    def weight(self) -> Tensor:
        return self.head.module.weight

    def part(self, tokens: int) -> "Inputs":
        student_ND = self.student_ND[:tokens].detach().clone().requires_grad_()
        return Inputs(student_ND, self.reference_ND[:tokens], self.target_N[:tokens], self.head)


def make_inputs(tokens: int, vocabulary: int, hidden: int) -> Inputs:
    torch.manual_seed(0)
    with DEVICE:
        module = nn.Linear(hidden, vocabulary, bias=False, dtype=DTYPE).requires_grad_(False)
        module.weight.normal_(std=2 * hidden**-0.5)
        student_ND = torch.randn(tokens, hidden, dtype=DTYPE)
        reference_ND = student_ND + 0.3 * torch.randn_like(student_ND)
        target_N = torch.randint(vocabulary, (tokens,))
    return Inputs(student_ND.requires_grad_(), reference_ND, target_N, Head(module))


# ---------------------------------------------------------------- the ways: each a sum over tokens


def naive_kl(inputs: Inputs) -> Tensor:
    return _naive_kl(inputs.head(inputs.student_ND), inputs)


def naive_both(inputs: Inputs) -> Tensor:
    logits_NV = inputs.head(inputs.student_ND)
    ce = F.cross_entropy(logits_NV, inputs.target_N, reduction="sum")
    return ce + _naive_kl(logits_NV, inputs)


def _naive_kl(logits_NV: Tensor, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        logq_NV = F.log_softmax(inputs.head(inputs.reference_ND), dim=-1)
    return F.kl_div(logq_NV, F.log_softmax(logits_NV, dim=-1), reduction="sum", log_target=True)


def tiled(inputs: Inputs, both: bool, tile_elements: int = TILE) -> Tensor:
    losses.TILE_ELEMENTS = tile_elements
    everywhere_N = torch.ones_like(inputs.target_N, dtype=torch.bool)
    kl = Divergence(everywhere_N, States(inputs.head, inputs.reference_ND))
    ce = [(1.0, CrossEntropy(everywhere_N, inputs.target_N))] if both else []
    return losses.weighted_sum(inputs.head, inputs.student_ND, [*ce, (1.0, kl)])[0]


def trl(inputs: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    weight = inputs.weight
    divergence_N, _ = ChunkedDivergenceFunction.apply(
        inputs.student_ND, weight, None, inputs.reference_ND, weight, None, 1.0
    )
    return divergence_N.sum()


def liger(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=1.0)
    mean = fused(inputs.student_ND, inputs.weight, inputs.reference_ND, inputs.weight, None)
    return mean * len(inputs.student_ND)


WAYS: dict[str, tuple[Callable[[Inputs], Tensor], str]] = {
    "naive": (naive_kl, "naive"),
    "ringfence": (partial(tiled, both=False), "naive"),
    "trl": (trl, "naive"),
    "liger": (liger, "naive"),
    "naive, with cross-entropy": (naive_both, "naive, with cross-entropy"),
    "ringfence, with cross-entropy": (partial(tiled, both=True), "naive, with cross-entropy"),
}  # name: the sum, and the naive way to the same number


def step(way: str, inputs: Inputs) -> tuple[float, Tensor]:
    """Forward and backward: the value and the gradient [N, D]."""
    inputs.student_ND.grad = None
    total = WAYS[way][0](inputs)
    total.backward()
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    assert inputs.student_ND.grad is not None
    return total.item(), inputs.student_ND.grad


# ---------------------------------------------------------------- what is measured


def disagreement(way: str, inputs: Inputs) -> str | None:
    """Why a way is left out: it does not run here, or is not the same loss."""
    try:
        value, gradient_ND = step(way, inputs)
    except Exception as error:  # on a machine it is not made for, a kernel fails in its own ways
        line = str(error).splitlines()[0] if str(error) else ""
        return f"does not run here: {type(error).__name__}: {line}"
    naive, naive_ND = step(WAYS[way][1], inputs)
    tolerance = 3e-2 if DTYPE is torch.bfloat16 else 1e-4
    value_error = abs(value - naive) / abs(naive)
    gradient_error = ((gradient_ND - naive_ND).norm() / naive_ND.norm()).item()
    print(f"{way}: value off by {value_error:.1e}, gradient by {gradient_error:.1e}", flush=True)
    if max(value_error, gradient_error) > tolerance:
        off = f"off by {value_error:.1e}, gradient by {gradient_error:.1e}"
        return f"another number than the naive form: {off}"
    return None


def extra_memory(way: str, shape: tuple[int, int, int]) -> int:
    """Bytes above the inputs, in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", way, "--tile-bits", *TILE_BITS]
    for name, size in zip(("--tokens", "--vocabulary", "--hidden"), shape):
        command += [name, str(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_memory(way: str, shape: tuple[int, int, int]) -> int:
    inputs = make_inputs(*shape)
    step(way, inputs.part(2))  # one-time loading by a library is not the loss's
    reset_peak_memory()
    before = peak_memory()
    step(way, inputs)
    return peak_memory() - before


def measure_seconds(ways: list[str], inputs: Inputs, rounds: int) -> dict[str, list[float]]:
    """In turns."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(-1, rounds):
        for way in ways:
            start = time.perf_counter()
            step(way, inputs)
            if round_ >= 0:  # the first round warms up
                found[way].append(time.perf_counter() - start)
    return found


# ---------------------------------------------------------------- the table


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--tokens", type=int, default=2048)
    arguments.add_argument("--vocabulary", type=int, default=151_936)
    arguments.add_argument("--hidden", type=int, default=1024)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument(
        "--tile-bits", nargs="*", default=[], help="also with tiles of 2^BITS logits"
    )
    arguments.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the measurements"
    )
    arguments.add_argument(
        "--memory-of", metavar="WAY", help="only print this way's extra memory, in bytes"
    )
    chosen = arguments.parse_args()
    TILE_BITS.extend(chosen.tile_bits)
    for bits in TILE_BITS:
        sized = partial(tiled, both=False, tile_elements=2 ** int(bits))
        WAYS[f"ringfence, tile 2^{bits}"] = (sized, "naive")
    shape = (chosen.tokens, chosen.vocabulary, chosen.hidden)
    if chosen.memory_of:
        print(measure_memory(chosen.memory_of, shape))
        return
    inputs = make_inputs(*shape)
    reasons = {way: disagreement(way, inputs.part(64)) for way in WAYS}
    ways = [way for way, reason in reasons.items() if reason is None]
    seconds = measure_seconds(ways, inputs, chosen.rounds)
    del inputs
    extra = {way: extra_memory(way, shape) for way in ways}
    rows = {
        way: {
            "seconds": spread(seconds[way]),
            "extra_bytes": extra[way],
            "time": spread([a / b for a, b in zip(seconds[way], seconds[WAYS[way][1]])]),
            "memory": extra[way] / extra[WAYS[way][1]],
        }
        for way in ways
    }
    left_out = {way: reason for way, reason in reasons.items() if reason is not None}
    setting = dict(zip(("tokens", "vocabulary", "hidden"), shape)) | {
        "dtype": str(DTYPE),
        "tile_elements": TILE,
    }
    save(chosen.results / "kl.json", {**setting, "ways": rows, "left_out": left_out})
    for way, row in rows.items():
        print(
            f"{way:32} time of naive {row['time']['median']:.3f}, memory of naive "
            f"{row['memory']:.3f}"
        )
    for way, reason in left_out.items():
        print(f"{way}: {reason}")


TILE_BITS: list[str] = []

if __name__ == "__main__":
    main()
