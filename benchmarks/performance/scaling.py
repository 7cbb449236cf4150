"""Do time and memory grow as the operations predict? Each sweep is compared with a law that was
written down before.

    python benchmarks/performance/scaling.py              # about 10 minutes on two quiet CPU cores
    python benchmarks/performance/scaling.py --quick      # fewer, smaller points: a check
    python benchmarks/performance/scaling.py --only sequence    # one sweep; the others stay

A law has one free constant (the machine's speed), fitted by least squares of the relative
deviations. If a step has a fixed cost (it launches as many operations for eight tokens as for a
thousand), that is measured at a point of its own and not fitted. Models have random weights. Writes
benchmarks/results/performance/scaling.json and the figures
docs/figures/performance/scaling-time.svg and scaling-memory.svg.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# Processes are forked after the slow imports; the check for a GPU must not start its driver before.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from peft import LoraConfig, get_peft_model
from transformers import (
    DefaultFlowCallback,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ringfence.defenses import (
    KL,
    LDIFS,
    DefenseConfig,
    Interleave,
    Setup,
    Steering,
    SubspaceLock,
    TReFT,
)
from ringfence.diagnose.diagnosis import Subject
from ringfence.diagnose.erosion import measure as erosion
from ringfence.diagnose.gradient_cosine import measure as gradient_cosine
from ringfence.diagnose.models import Models
from ringfence.model.directions import Directions
from ringfence.model.files import load_tokenizer
from ringfence.model.losses import TILE_ELEMENTS
from ringfence.model.scoring import score_answers
from ringfence.text.batch import Example
from ringfence.text.chat import Chat
from ringfence.text.roles import Role
from ringfence.text.rows import PairedQuestion, load_questions
from ringfence.training.config import MonitorConfig
from ringfence.training.monitor import DriftMonitor
from ringfence.training.stream import TrainStream
from ringfence.training.trainer import DefendedTrainer
from ringfence.util import plots
from ringfence.util.machine import environment, peak_memory, reset_peak_memory

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "performance" / "scaling.json"
FIGURES = ROOT / "docs" / "figures" / "performance"
Work = Callable[[], None]  # one run of what is measured
ALLOWED = 0.15  # a law holds if no point is further off
M_MMAP_THRESHOLD, SMALLEST = -3, 2**16  # from malloc.h; bytes that get a mapping of their own


# ------------------------------------------------------------------ the laws: operations of a step


@dataclass(frozen=True)
class Shape:
    """A Llama with LoRA on all its linear layers. Operations are multiplications and additions."""

    layers: int = 6
    hidden: int = 384
    inner: int = 1024
    heads: int = 6
    vocabulary: int = 16384
    rank: int = 8

    @property
    def linear(self) -> int:
        """Frozen weights of the linear layers."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.inner)

    @property
    def adapter(self) -> int:
        return self.layers * self.rank * (8 * self.hidden + 3 * (self.hidden + self.inner))

    def step(self, rows: int, width: int, labelled: int) -> float:
        """Per weight and token, forward takes 2 operations, backward 2 for its input and 2 for
        itself if it is trained. Attention: 7 products (2 forward, 5 backward) over width^2 / 2
        places. Head: only `labelled` tokens."""
        tokens = rows * width
        attention = 7 * self.layers * self.hidden * rows * width**2
        return tokens * (4 * self.linear + 6 * self.adapter) + attention + 4 * self.head(labelled)

    def reference(self, rows: int, width: int, labelled: int) -> float:
        """A forward without adapters, and its logits."""
        attention = 2 * self.layers * self.hidden * rows * width**2
        return rows * width * 2 * self.linear + attention + 2 * self.head(labelled)

    def head(self, labelled: int) -> float:
        return labelled * self.vocabulary * self.hidden


SHAPE = Shape()
ROWS, WIDTH = 8, 128  # unless they are swept


def labelled(rows: int, width: int) -> int:
    """Half of a row is its response."""
    return rows * (width // 2)


# ------------------------------------------------------------------ training


def random_model(shape: Shape, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    device = torch.accelerator.current_accelerator() or "cpu"
    dtype = torch.float32 if str(device) == "cpu" else torch.bfloat16
    return LlamaForCausalLM(config).to(device, dtype).eval()


def with_lora(model: Any, rank: int = SHAPE.rank) -> Any:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)


def random_rows(number: int, width: int, vocabulary: int) -> list[Example]:
    """Rows of one width: a shared prefix, a query, a postfix, a response of half the row."""
    rng = random.Random(0)
    response = width // 2
    prefix, postfix = width // 8, width // 16
    roles = [Role.PREFIX] * prefix + [Role.QUERY] * (width - prefix - postfix - response)
    roles += [Role.POSTFIX] * postfix + [Role.RESPONSE] * response
    own = width - prefix
    ids = [
        [*range(prefix), *(rng.randrange(vocabulary) for _ in range(own))] for _ in range(number)
    ]
    return [Example(row, roles, f"row {place}") for place, row in enumerate(ids)]


def training(
    folder: Path,
    rows: int = ROWS,
    width: int = WIDTH,
    shape: Shape = SHAPE,
    defenses: Sequence[DefenseConfig] = (),
) -> Work:
    """One optimiser step of ringfence's trainer: batch, forwards, backward, update, and the
    defenses' work."""
    examples = random_rows(64 * rows, width, shape.vocabulary)
    built = [config.build(Setup(None, examples, lambda _: examples, "")) for config in defenses]  # type: ignore[arg-type]
    model = with_lora(random_model(shape))
    on_accelerator = torch.accelerator.is_available()
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=rows,
        use_cpu=not on_accelerator,
        bf16=on_accelerator,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DefendedTrainer(
        model, arguments, TrainStream(examples, examples, built, rows, 0), built, 0, folder / "log"
    )
    trainer.start_defenses(None)
    optimizer = trainer.create_optimizer()
    trainer.model_wrapped, optimizer = trainer.accelerator.prepare(model, optimizer)
    batches = endless(trainer.get_train_dataloader())
    trainer.remove_callback(
        DefaultFlowCallback
    )  # decides when to log and save; this is not a whole run

    def step() -> None:
        [batch], number = trainer.get_batch_samples(batches, 1, trainer.args.device)
        trainer.training_step(trainer.model_wrapped, batch, number)
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trainer.state.global_step += 1
        trainer.callback_handler.on_step_end(trainer.args, trainer.state, trainer.control)

    return step


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def naive_kl(folder: Path, rows: int, width: int, shape: Shape) -> Work:
    """What `training` with a KL does, in the usual form: with all logits of both models."""
    model = with_lora(random_model(shape))
    ids_BT = torch.tensor(
        [e.input_ids for e in random_rows(rows, width, shape.vocabulary)], device=model.device
    )
    target_BT = ids_BT.clone()
    target_BT[:, : width - width // 2] = -100

    def step() -> None:
        logits_NV = model(ids_BT).logits[:, :-1].float().flatten(0, 1)
        with torch.no_grad(), model.disable_adapter():
            log_q_NV = F.log_softmax(model(ids_BT).logits[:, :-1].float().flatten(0, 1), -1)
        target_N = target_BT[:, 1:].flatten()
        chosen_N = target_N != -100
        kl_NV = F.kl_div(log_q_NV, F.log_softmax(logits_NV, -1), reduction="none", log_target=True)
        (F.cross_entropy(logits_NV, target_N) + kl_NV.sum(-1)[chosen_N].mean()).backward()
        model.zero_grad()

    return step


# From left to right one more defense; those without a reference pass come first.
STACK: list[tuple[str, Callable[[Path], DefenseConfig]]] = [
    ("treft", lambda _: TReFT()),
    ("interleave", lambda _: Interleave(ratio=0.1)),
    ("subspace\nlock", lambda folder: SubspaceLock(vectors=directions(folder))),
    (
        "steering",
        lambda folder: Steering(vectors=directions(folder), units="norm", coefficient=0.1),
    ),
    ("kl", lambda _: KL(where="train")),
    ("ldifs", lambda _: LDIFS()),
]
WITHOUT_REFERENCE = 4


def directions(folder: Path) -> str:
    torch.manual_seed(0)
    file = folder / "directions.safetensors"
    random_LKD, norms_L = torch.randn(SHAPE.layers, 1, SHAPE.hidden), torch.ones(SHAPE.layers)
    Directions(random_LKD, norms_L, "random", "random", 1, 1).save(file)
    return str(file)


def composed(number: int, folder: Path) -> Work:
    return training(folder, defenses=[make(folder) for _, make in STACK[:number]])


def composed_law(number: int) -> float:
    plain = SHAPE.step(ROWS, WIDTH, labelled(ROWS, WIDTH))
    with_reference = number > WITHOUT_REFERENCE
    return plain + with_reference * SHAPE.reference(ROWS, WIDTH, labelled(ROWS, WIDTH))


def kept_by_step(logits: int, kl: bool) -> float:
    """Count of numbers: 34 hidden sizes per token and layer (for the backward pass), and, each of a
    tile's size, the student's log-probabilities, the slope in them and, with a KL, the reference's
    logits."""
    return 34 * SHAPE.layers * SHAPE.hidden * ROWS * WIDTH + (2 + kl) * logits


def composed_memory(number: int) -> float:
    """LDIFS adds, in each of five layers, the student's and the reference's state and their
    difference."""
    names = [name for name, _ in STACK[:number]]
    ldifs = 5 * 3 * SHAPE.hidden * ROWS * WIDTH * ("ldifs" in names)
    return kept_by_step(labelled(ROWS, WIDTH) * SHAPE.vocabulary, kl="kl" in names) + ldifs


# ------------------------------------------------------------------ questions

CHECKED = 2  # forwards, in questions, that check whether answers may share a row
ALIGNED = 43  # tokens of an aligned answer of the eight questions, on average
# With the default tokenizer's vocabulary.
SMALL = Shape(layers=4, hidden=256, inner=768, heads=4, vocabulary=49152)
BATCH_TOKENS = 1024


def questions(number: int) -> list[PairedQuestion]:
    """The same eight over and over, under other names: each eight have the same number of
    tokens."""
    eight = load_questions("shipped:values")[:8]
    return [
        replace(eight[place % 8], id=str(place), domain=("inside", "outside")[place % 2])
        for place in range(number)
    ]


def evaluation(number: int, folder: Path) -> Work:
    """Paired forced choice: both answers to each question."""
    chat, model, asked = Chat(load_tokenizer("default")), random_model(SMALL), questions(number)
    prompts = [[{"role": "user", "content": q.question}] for q in asked]
    answers = [[q.aligned, q.misaligned] for q in asked]
    return lambda: void(score_answers(model, chat, prompts, answers, BATCH_TOKENS))


def check_of_monitor(number: int, folder: Path) -> Work:
    """A check of the drift monitor, other than the first one, which takes the reference's
    values."""
    file = folder / "probes.jsonl"
    fields = ("id", "domain", "question", "aligned", "misaligned")
    file.write_text(
        "".join(json.dumps({f: getattr(q, f) for f in fields}) + "\n" for q in questions(number))
    )
    config = MonitorConfig(every=1, probes=number, questions=[str(file)])
    monitor = DriftMonitor(load_tokenizer("default"), folder / "log.jsonl", config)
    model = with_lora(random_model(SMALL))
    arguments = TrainingArguments(
        str(folder), use_cpu=not torch.accelerator.is_available(), report_to=[]
    )
    state, control = TrainerState(global_step=1, max_steps=100), TrainerControl()
    monitor.on_train_begin(arguments, state, control, model=model)
    return lambda: monitor.on_step_end(arguments, state, control, model=model)


def diagnosis(module: Any) -> Callable[[int, Path], Work]:
    def make(number: int, folder: Path) -> Work:
        base, reference, tuned = (random_model(SMALL, seed) for seed in range(3))
        models = Models(reference, {"tuned": tuned}, base, tokenizer=load_tokenizer("default"))
        asked = questions(number)
        subject = Subject(models, asked[::2], asked[1::2], batch_tokens=BATCH_TOKENS)
        return lambda: void(module.measure(subject))

    return make


def void(_: Any) -> None:
    """Drops a result."""


# ------------------------------------------------------------------ the sweeps


@dataclass(frozen=True)
class Sweep:
    """What is varied, and the laws of time and memory up to a constant factor.

    Attributes:
        make: builds a point's work in a folder. Point 0 of a sweep with `has_floor` is the smallest
            work there is.
        kept: memory's law; None = constant.
        naive: the same work in its usual form.
    """

    title: str
    axis: str
    points: tuple[int, ...]
    make: Callable[[int, Path], Work]
    time_law: Callable[[int], float]
    time_words: str
    memory_words: str
    kept: Callable[[int], float] | None = None
    has_floor: bool = False
    naive: Callable[[int, Path], Work] | None = None
    labels: tuple[str, ...] = ()

    def fewer(self) -> "Sweep":
        return self if self.labels else replace(self, points=self.points[:3])


FLOOR = 16  # tokens in one row


def of_width(width: int, folder: Path) -> Work:
    return training(folder, 2 if width else 1, width or FLOOR)


def of_rows(rows: int, folder: Path) -> Work:
    return training(folder, rows or 1, WIDTH if rows else FLOOR)


def at_floor(ops: Callable[[int], float]) -> Callable[[int], float]:
    return lambda point: ops(point) if point else SHAPE.step(1, FLOOR, FLOOR // 2)


def of_vocabulary(vocabulary: int) -> Shape:
    return replace(SHAPE, vocabulary=vocabulary)


def memory_of_check(number: int) -> float:
    """Drift is a KL over all aligned answers: their logits, at most a tile."""
    return min(TILE_ELEMENTS, number * ALIGNED * SMALL.vocabulary)


def memory_with_kl(vocabulary: int) -> float:
    """At most a tile of logits."""
    return kept_by_step(min(TILE_ELEMENTS, labelled(ROWS, WIDTH) * vocabulary), kl=True)


SWEEPS: dict[str, Sweep] = {
    "sequence": Sweep(
        "sequence length", "tokens in a row", (128, 256, 512, 1024), of_width,
        at_floor(lambda width: SHAPE.step(2, width, labelled(2, width))),
        "a T + b T², b / a from the shape", "linear: no T² is kept",
        lambda width: 2 * width if width else FLOOR, has_floor=True,
    ),
    "batch": Sweep(
        "batch size", "rows of 128 tokens", (1, 2, 4, 8, 16), of_rows,
        at_floor(lambda rows: SHAPE.step(rows, WIDTH, labelled(rows, WIDTH))), "linear",
        "linear", lambda rows: rows * WIDTH if rows else FLOOR, has_floor=True,
    ),
    "vocabulary": Sweep(
        "vocabulary, with kl", "tokens in the vocabulary", (16384, 32768, 65536, 131072),
        lambda v, folder: training(folder, ROWS, WIDTH, of_vocabulary(v), [KL(where="train")]),
        lambda v: sum(
            count(ROWS, WIDTH, labelled(ROWS, WIDTH))
            for count in (of_vocabulary(v).step, of_vocabulary(v).reference)
        ),
        "linear by the head's share", "flat once a tile is full", memory_with_kl,
        naive=lambda v, folder: naive_kl(folder, ROWS, WIDTH, of_vocabulary(v)),
    ),
    "defenses": Sweep(
        "defenses together", "", tuple(range(len(STACK) + 1)), composed, composed_law,
        "1, with a reference pass about 1.5", "a tile more with the reference", composed_memory,
        labels=("plain", *(f"+ {name}" for name, _ in STACK)),
    ),
    "evaluation": Sweep(
        "paired evaluation", "questions", (8, 16, 32, 64), evaluation,
        lambda number: number + CHECKED, "linear, and two for a check", "flat: batch by batch",
    ),
    "monitor": Sweep(
        "check of the drift monitor", "probe questions", (8, 16, 32), check_of_monitor, float,
        "linear", "flat once a tile is full", memory_of_check,
    ),
    "erosion": Sweep(
        "diagnosis: erosion", "questions", (8, 16, 32, 64), diagnosis(erosion), float, "linear",
        "flat: only sums are kept",
    ),
    "gradient_cosine": Sweep(
        "diagnosis: gradient cosine", "questions", (8, 16, 32), diagnosis(gradient_cosine), float,
        "linear", "flat: no gradient is held in full",
    ),
}  # fmt: skip


# ------------------------------------------------------------------ measuring


def forked(target: Callable[[], Any]) -> Any:
    """The result of `target` in a process of its own, which starts as a copy of this one: with
    everything imported, and no model."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(target()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        sys.exit("a measurement failed, see above")
    finally:
        process.join()


@contextmanager
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def seconds(
    sweep: Sweep, points: Sequence[int], repeats: int, clock: Callable[[], float]
) -> dict[int, list[float]]:
    """Seconds of each point, measured in turns (1 2 3 1 2 3 ...), so that a slow phase of the
    machine affects all alike. The first turn is dropped."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        works = {}
        for point in points:
            place = Path(folder) / str(point)
            place.mkdir()
            works[point] = sweep.make(point, place)
        taken: dict[int, list[float]] = {point: [] for point in points}
        for _ in range(1 + repeats):
            for point, work in works.items():
                gc.collect()
                synchronise()
                started = clock()
                work()
                synchronise()
                taken[point].append(clock() - started)
    return {point: values[1:] for point, values in taken.items()}


def synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def mebibytes(make: Callable[[int, Path], Work], point: int) -> float:
    """Peak of two runs, above the memory with the model loaded."""
    if platform.libc_ver()[0] == "glibc":
        # Freed memory is returned at once. By default glibc keeps some: peaks of the same work
        # differed by a fifth, and were up to twice as high.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALLEST)
    with tempfile.TemporaryDirectory() as folder, quiet():
        work = make(point, Path(folder))
        gc.collect()
        reset_peak_memory()  # to what is in use now
        before = peak_memory()
        work()
        work()
        return (peak_memory() - before) / 2**20


def fit(
    points: Sequence[int], values: Sequence[float], law: Callable[[int], float], floor: float = 0.0
) -> list[float]:
    """The law's values: floor + c * (law(point) - law(0)), c by least squares of the relative
    deviations."""
    start = law(0) if floor else 0.0
    grows = np.array([law(point) - start for point in points]) / np.array(values)
    rest = 1 - floor / np.array(values)
    c = float((grows * rest).sum() / (grows**2).sum())
    return [floor + c * (law(point) - start) for point in points]


def held_against(
    points: Sequence[int], values: Sequence[float], law: list[float], words: str
) -> dict[str, Any]:
    off = [value / expected - 1 for value, expected in zip(values, law)]
    worst = max(range(len(off)), key=lambda place: abs(off[place]))
    return {
        "law": words,
        "expected": [round(value, 4) for value in law],
        "largest_deviation": round(off[worst], 4),
        "at": points[worst],
        "holds": abs(off[worst]) <= ALLOWED,
    }


def measure(sweep: Sweep, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    floor = (0,) if sweep.has_floor else ()
    taken = forked(lambda: seconds(sweep, [*floor, *sweep.points], repeats, clock))
    kept = {
        point: forked(partial(mebibytes, sweep.make, point)) for point in [*floor, *sweep.points]
    }
    quartiles = {
        point: [float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))]
        for point, values in taken.items()
    }
    medians = [quartiles[point][1] for point in sweep.points]
    peaks = [kept[point] for point in sweep.points]
    time_law = fit(sweep.points, medians, sweep.time_law, quartiles[0][1] if floor else 0.0)
    memory_law = fit(sweep.points, peaks, sweep.kept or (lambda _: 1.0), kept[0] if floor else 0.0)
    found = {
        "points": list(sweep.points),
        "repeats": repeats,
        "seconds": [[round(q, 4) for q in quartiles[point]] for point in sweep.points],
        "time": held_against(sweep.points, medians, time_law, sweep.time_words),
        "mebibytes": [round(value, 1) for value in peaks],
        "memory": held_against(sweep.points, peaks, memory_law, sweep.memory_words),
    }
    if floor:
        found["floor"] = {"seconds": round(quartiles[0][1], 4), "mebibytes": round(kept[0], 1)}
    if sweep.naive:
        peaks = [forked(partial(mebibytes, sweep.naive, point)) for point in sweep.points]
        law = fit(sweep.points, peaks, float)
        found["naive"] = {
            "mebibytes": [round(value, 1) for value in peaks],
            "memory": held_against(sweep.points, peaks, law, "linear"),
        }
    return found


# ------------------------------------------------------------------ showing


def show(name: str, found: dict[str, Any]) -> None:
    sweep = SWEEPS[name]
    print(f"\n{sweep.title}  (time: {sweep.time_words}; memory: {sweep.memory_words})")
    print(
        f"{sweep.axis or 'defenses':>26} {'seconds':>9} {'law':>9} {'MiB':>9} {'law':>9}"
        + " naive MiB" * ("naive" in found)
    )
    for place, point in enumerate(found["points"]):
        label = sweep.labels[point].replace("\n", " ") if sweep.labels else str(point)
        line = (
            f"{label:>26} {found['seconds'][place][1]:9.3f} {found['time']['expected'][place]:9.3f}"
        )
        line += f" {found['mebibytes'][place]:9.0f} {found['memory']['expected'][place]:9.0f}"
        print(line + (f" {found['naive']['mebibytes'][place]:9.0f}" if "naive" in found else ""))
    for kind in ("time", "memory"):
        judged = found[kind]
        verdict = "holds" if judged["holds"] else "FAILS"
        print(
            f"  {kind}: {verdict}, off by {judged['largest_deviation']:+.1%} at most (at "
            f"{judged['at']})",
            flush=True,
        )


def draw_time(results: dict[str, Any]) -> Figure:
    figure, panels = panels_of(results)
    for axes, (name, found) in zip(panels, results.items()):
        low, median, high = np.array(found["seconds"]).T
        base = median[0] if SWEEPS[name].labels else 1.0
        spread = np.array([median - low, high - median]) / base
        place = places(name, found)
        draw_law(axes, name, place, np.array(found["time"]["expected"]) / base)
        form: dict[str, Any] = {"fmt": "o", "markersize": 4.5, "elinewidth": 1.4}
        axes.errorbar(place, median / base, yerr=spread, color=plots.colour(0), **form)
        unit = "ratio to plain" if SWEEPS[name].labels else "seconds"
        finish(axes, name, found, found["time"], unit)
    measured = ("o", plots.colour(0), "measured: median, quartiles")
    legend(panels[-1], [measured, ("-", "#777777", "law")])
    return figure


def draw_memory(results: dict[str, Any]) -> Figure:
    figure, panels = panels_of(results)
    for axes, (name, found) in zip(panels, results.items()):
        place = places(name, found)
        if "naive" in found:
            naive, law = found["naive"]["mebibytes"], found["naive"]["memory"]["expected"]
            axes.plot(place, naive, "s", color=plots.colour(4), markersize=4.5)
            axes.plot(place, law, "--", color="#777777", linewidth=1.2)
        draw_law(axes, name, place, np.array(found["memory"]["expected"]))
        axes.plot(place, found["mebibytes"], "o", color=plots.colour(1), markersize=4.5)
        finish(axes, name, found, found["memory"], "MiB above the model")
    legend(
        panels[-1],
        [
            ("o", plots.colour(1), "measured: peak of a process"),
            ("-", "#777777", "law"),
            ("s", plots.colour(4), "naive: all logits at once"),
            ("--", "#777777", "its law: linear"),
        ],
    )
    return figure


def panels_of(results: dict[str, Any]) -> tuple[Figure, list[Axes]]:
    """Three per line, the last one for the legend."""
    lines = -(-(len(results) + 1) // 3)
    figure, grid = plt.subplots(
        lines, 3, figsize=(9, 2.75 * lines), squeeze=False, constrained_layout=True
    )
    panels = list(grid.flat)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    return figure, [*panels[: len(results)], panels[-1]]


def places(name: str, found: dict[str, Any]) -> list[int]:
    return list(range(len(found["points"]))) if SWEEPS[name].labels else found["points"]


def draw_law(axes: Axes, name: str, place: list[int], law: np.ndarray) -> None:
    step = {"drawstyle": "steps-mid"} if SWEEPS[name].labels else {}
    axes.plot(place, law, color="#777777", linewidth=1.4, **step)  # type: ignore[arg-type]


def finish(axes: Axes, name: str, found: dict[str, Any], judged: dict[str, Any], unit: str) -> None:
    sweep = SWEEPS[name]
    verdict = "off by" if judged["holds"] else "FAILS: off by"
    axes.set_title(sweep.title, loc="left", fontsize=9.5, fontweight="bold", pad=17)
    note = f"{judged['law']}; {verdict} {abs(judged['largest_deviation']):.0%}"
    shade = "#555555" if judged["holds"] else "#b3261e"
    axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=7.5, color=shade)
    axes.set_ylabel(unit, fontsize=8.5)
    axes.set_xlabel(sweep.axis, fontsize=8.5)
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.tick_params(labelsize=8)
    if sweep.labels:
        form: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(sweep.labels)), sweep.labels, fontsize=7.5, **form)
    else:
        axes.set_xlim(0, 1.06 * found["points"][-1])
        shown = [point for point in found["points"] if point >= found["points"][-1] / 8]
        axes.xaxis.set_major_locator(FixedLocator(shown))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{x / 1024:.0f}k" if x >= 8192 else f"{x:.0f}")
        )


def legend(axes: Axes, entries: list[tuple[str, str, str]]) -> None:
    handles = []
    for form, colour, label in entries:
        line: Any = {"linestyle": form} if "-" in form else {"marker": form, "linestyle": ""}
        handles.append(Line2D([], [], color=colour, label=label, **line))
    axes.legend(handles=handles, loc="center", fontsize=8.5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer points and repeats; writes to --output only"
    )
    parser.add_argument(
        "--only", choices=list(SWEEPS), action="append", help="a sweep; may be given several times"
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "process"],
        default="wall",
        help="process: on a busy machine",
    )
    parser.add_argument("--repeats", type=int, default=0, help="timed turns (default 5, quick 2)")
    parser.add_argument("--output", type=Path, default=RESULT, help="file of the results")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figures")
    parser.add_argument("--draw", action="store_true", help="only draw the existing results")
    given = parser.parse_args()
    found = (
        json.loads(given.output.read_text())
        if given.output.is_file() and (given.only or given.draw)
        else {}
    )
    results = found.get("sweeps", {})
    clock = time.process_time if given.clock == "process" else time.perf_counter
    for name in [] if given.draw else given.only or list(SWEEPS):
        sweep = SWEEPS[name].fewer() if given.quick else SWEEPS[name]
        results[name] = measure(sweep, given.repeats or (2 if given.quick else 5), clock)
        show(name, results[name])
    results = {name: results[name] for name in SWEEPS if name in results}
    if not given.draw:
        threads = torch.get_num_threads()
        machine = {
            "environment": environment(0),
            "threads": threads,
            "clock": given.clock,
            "quick": given.quick,
        }
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(
            json.dumps({"machine": machine, "sweeps": results}, indent=1) + "\n"
        )
    given.figures.mkdir(parents=True, exist_ok=True)
    with plots.style():
        for kind, draw in (("time", draw_time), ("memory", draw_memory)):
            (given.figures / f"scaling-{kind}.svg").write_bytes(plots.svg(draw(results)))


if __name__ == "__main__":
    main()
