"""Diagnoses in a folder, written to diagnosis.json and figures/.

Each is announced with its cost, made, and written at once. An existing one of the same models and
texts is kept. Does not know recipes.
"""

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import RecipeError, nearest
from ..model.activations import batches
from ..runfolder.names import DIAGNOSIS, FIGURES
from ..runfolder.shapes import read_diagnosis
from ..stats import finite, stored
from ..util.console import console
from ..util.files import write_whole
from ..util.journal import digest
from ..util.plots import style, svg
from .diagnosis import DIAGNOSES, Cost, Subject, measuring, showing
from .models import REFERENCE
from .scope.measure import scopes
from .texts import pair_texts, response_logprobs

# These need questions of the training domain.
NEED_INSIDE = ("loss_cosine", "gradient_cosine", "shared_directions")


def diagnose_folder(folder: Path, subject: Subject, names: Sequence[str] = ()) -> dict[str, Any]:
    """Makes diagnoses (default: all that are possible) and writes what each found.

    Returns:
        By name: title, sentence, table, numbers, the figure's file in the folder, and seconds.

    Raises:
        RecipeError: a name is unknown, or needs the base, and there is none.
    """
    chosen = _chosen(names, subject)
    texts = [repr(part) for part in (subject.questions, subject.rows)]
    key = digest([subject.models.key(), texts, subject.seed])
    found = read_diagnoses(folder)
    wanted = [name for name in chosen if found.get(name, {}).get("key") != key]
    speed = _tokens_per_second(subject) if wanted else 0.0
    for name in wanted:
        module, words = measuring(name), showing(name)
        line = f"{name}: {announce(module.cost(subject), speed)}"
        console.print(line, highlight=False, soft_wrap=True)
        started = time.monotonic()
        # As they are stored, so that the file alone gives the same texts and figure.
        numbers = stored(json.loads(_as_json(module.measure(replace(subject, folder=folder)))))
        found[name] = {
            "key": key,
            "title": module.TITLE,
            "sentence": words.say(numbers),
            "table": asdict(words.table(numbers)),
            "numbers": numbers,
            "figure": _draw(folder, name, numbers),
            "models": subject.models.names,
            "seconds": round(time.monotonic() - started, 1),
        }
        ordered = {name: found[name] for name in DIAGNOSES if name in found}
        write_whole(folder / DIAGNOSIS, _as_json(ordered))
        line = f"{found[name]['sentence']} ({found[name]['seconds']:.0f} s)\n"
        console.print(line, highlight=False, soft_wrap=True)
        gc.collect()
    return {name: found[name] for name in chosen}


def read_diagnoses(folder: Path) -> dict[str, Any]:
    """The contents of a folder's diagnosis.json; empty if there is none."""
    file = folder / DIAGNOSIS
    return read_diagnosis(file) if file.is_file() else {}


def draw_again(folder: Path) -> list[Path]:
    """Redraws the figures of a folder from its diagnosis.json alone; returns their files."""
    found = read_diagnoses(folder)
    return [
        folder / _draw(folder, name, stored(found[name]["numbers"]))
        for name in DIAGNOSES
        if name in found
    ]


def _draw(folder: Path, name: str, numbers: dict[str, Any]) -> str:
    figure = f"{FIGURES}/{name}.svg"
    with style():
        write_whole(folder / figure, svg(showing(name).draw(numbers)))
    return figure


def _as_json(found: dict[str, Any]) -> str:
    return json.dumps(finite(found), indent=1, allow_nan=False)


def _chosen(names: Sequence[str], subject: Subject) -> list[str]:
    has_base = subject.models.has_base
    for name in names:
        if name not in DIAGNOSES:
            raise RecipeError(f"{name}: no such diagnosis{nearest(name, DIAGNOSES)}")
        if measuring(name).NEEDS_BASE and not has_base:
            raise RecipeError(
                f"{name} needs the pre-trained model before its alignment: name it with --base"
            )
    if names:
        return [name for name in DIAGNOSES if name in names]
    left_out = [name for name in DIAGNOSES if measuring(name).NEEDS_BASE and not has_base]
    if left_out:
        console.print(
            f"left out because they need the pre-trained model (--base): {', '.join(left_out)}"
        )
    possible = [name for name in DIAGNOSES if name not in left_out]
    outside_only = [name for name in possible if name in NEED_INSIDE and not subject.inside]
    if outside_only:
        console.print(
            "left out because they need paired questions of the training domain "
            f"(evaluate.in_domain): {', '.join(outside_only)}"
        )
    unscoped = [] if scopes(subject) else ["scope"]
    return [name for name in possible if name not in [*outside_only, *unscoped]]


def announce(cost: Cost, speed: float) -> str:
    """The cost in words; `speed`: tokens a second forward. A backward pass takes twice the time.

    A range, because estimates from tokens alone were off by up to four times; assumed too low, as
    hooks, statistics and figures are not counted."""
    parts = [f"{cost.forward:,} tokens forward"]
    if cost.backward:
        parts.append(f"{cost.backward:,} forward and backward")
    if cost.kept >= 2**20:
        parts.append(f"{cost.kept / 2**20:,.0f} MiB kept next to the model")
    seconds = (cost.forward + 3 * cost.backward) / speed
    return f"{', '.join(parts)}; {seconds:.0f} to {4 * seconds:.0f} s"


def _tokens_per_second(subject: Subject) -> float:
    """Speed of a forward pass of the reference over one batch of the texts, the second time."""
    examples = [text.example for text in pair_texts(subject.chat, subject.questions[:8])]
    with subject.models.open(REFERENCE) as model:
        _, batch = next(batches(examples, subject.chat, subject.batch_tokens, model.device))
        for _ in range(2):
            started = time.monotonic()
            response_logprobs(model, batch)
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
    return batch["input_ids"].numel() / (time.monotonic() - started)
