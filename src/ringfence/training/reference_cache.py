"""The reference on disk: its final hidden states, or its most probable next tokens, computed once
before training for exactly the rows that a run will request.

Everything is named by what it depends on: a folder by the model, a tensor by the token ids of one
row and the chosen places in it. So after a change nothing stale is found; it is computed again.
Does not know how states are computed, or what they are compared with.

Shapes: B rows, T tokens, N chosen tokens (row by row), D hidden size, K most probable tokens.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DefenseError, RecipeError
from ..model.default import cache_folder, make_cache
from ..model.scoring import length_batches
from ..model.taps import Needs
from ..text.batch import Batch, Example, collate, prefix_of
from ..text.roles import Role
from ..util.console import console, progress
from ..util.files import write_whole
from ..util.journal import digest
from ..util.words import counted
from .stream import TrainStream

Kind = Literal["states", "top_k"]
Compute = Callable[[Batch, Tensor], tuple[Tensor, ...]]

PARTS: dict[Kind, tuple[str, ...]] = {"states": ("hidden",), "top_k": ("token_ids", "logprobs")}
BATCH_TOKENS = 4096
SHARD_BYTES, SHARD_ROWS = 2**26, 512  # what a crash may lose
_STALE = 86400  # seconds after which nobody is still writing a half-written file


# ------------------------------------------------------------------ what a run requests


@dataclass(frozen=True)
class CachedRow:
    """Token ids of a row without padding, [T], and which places are chosen, [T]."""

    ids_T: Tensor
    chosen_T: Tensor

    @cached_property
    def name(self) -> str:
        content = self.ids_T.numpy().astype("<i4").tobytes() + self.chosen_T.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.ids_T)

    @property
    def positions(self) -> int:
        return int(self.chosen_T.sum())


def rows_of(batch: Batch, mask_BT: Tensor) -> list[CachedRow]:
    """The rows of a batch in which something is chosen."""
    ids_BT, real_BT = batch["input_ids"].cpu().int(), batch["attention_mask"].cpu().bool()
    mask_BT = mask_BT.cpu()
    rows = mask_BT.any(1).nonzero()[:, 0].tolist()
    return [CachedRow(ids_BT[row][real_BT[row]], mask_BT[row][real_BT[row]]) for row in rows]


@dataclass(frozen=True)
class Wanted:
    """What a run will request: distinct rows by name, and prefixes for keys and values."""

    rows: dict[str, CachedRow]
    prefixes: set[tuple[int, ...]]


def wanted(stream: TrainStream, steps: int) -> Wanted:
    """What the stream's defenses will request in `steps` steps. Leaves it at its first epoch.

    Raises:
        RecipeError: a defense needs the reference's own forward, or none requests anything that
            could be cached.
    """
    rows: dict[str, CachedRow] = {}
    prefixes: set[tuple[int, ...]] = set()
    for step in range(steps):
        if step % stream.steps_per_epoch == 0:
            stream.set_epoch(step // stream.steps_per_epoch)
        due = [
            defense
            for defense in stream.defenses
            if defense.has_penalty and step % defense.every == 0
        ]
        if not due:
            continue
        start = step % stream.steps_per_epoch * stream.step_rows
        places = range(start, min(start + stream.step_rows, len(stream)))
        batch = collate([stream[place] for place in places], pad_id=0)
        needs = Needs()
        for defense in due:
            asked = defense.needs(batch)
            _check_servable(defense.name, asked, batch)
            needs = needs | asked
        if needs.hidden_BT is not None:
            rows |= {row.name: row for row in rows_of(batch, needs.hidden_BT)}
        if needs.kv_BT is not None:
            prefixes |= {
                prefix_of(batch, row) for row in needs.kv_BT.any(1).nonzero()[:, 0].tolist()
            }
    stream.set_epoch(0)
    if not rows:
        raise RecipeError(
            "train.reference_cache: no defense compares next-token distributions with the "
            "reference's (defenses.kl does), so nothing would be cached; set it to none"
        )
    return Wanted(rows, prefixes)


def _check_servable(name: str, needs: Needs, batch: Batch) -> None:
    reason = None
    if needs.states_BT is not None:
        reason = "the residual stream of layers"
    elif needs.kv_BT is not None and (batch["roles"][needs.kv_BT] != Role.PREFIX).any():
        reason = "keys and values of tokens after the prefix"
    if reason:
        raise RecipeError(
            f"train.reference_cache: defenses.{name} compares {reason}, which is not cached: the "
            "reference would still run in every step. Set train.reference_cache: none, or leave "
            f"defenses.{name} out"
        )


# ------------------------------------------------------------------ what is on disk


class ReferenceCache:
    """States of one reference, in a folder of safetensors files that many runs may use at once.

    Args:
        kind: `states`, or `top_k` next tokens.
        reference: everything except the rows that determines the states, as plain JSON values:
            fingerprint of the model, precision, attention.
        k: for `top_k`.
        root: folder of the caches; default: `reference` in the user's cache folder.
    """

    def __init__(
        self, kind: Kind, reference: dict[str, Any], k: int = 64, root: Path | None = None
    ) -> None:
        self.kind, self.k = kind, k
        about = {**reference, "kind": kind, "k": k if kind == "top_k" else None}
        # Its code is part of the model.
        self.about = {**about, "transformers": metadata.version("transformers")}
        self.digest = digest(self.about)
        self.folder = (root or cache_folder() / "reference") / self.digest
        self._shards: dict[str, Any] = {}  # by the name of a row
        self._seen: set[str] = set()
        self._open_shards()

    def read(self, batch: Batch, mask_BT: Tensor) -> tuple[Tensor, ...]:
        """At the tokens of the mask, row by row: hidden states [N, D], or token ids and
        log-probabilities [N, K].

        Raises:
            DefenseError: a row is not in the cache.
        """
        found = [self._read_row(row.name) for row in rows_of(batch, mask_BT)]
        return tuple(torch.cat(parts).to(mask_BT.device) for parts in zip(*found))

    def _read_row(self, name: str) -> list[Tensor]:
        if name not in self._shards:
            raise DefenseError(
                "train.reference_cache: a row, or places in it, that no defense asked for before "
                f"training: {name} is not in {self.folder}"
            )
        return [self._shards[name].get_tensor(f"{name}.{part}") for part in PARTS[self.kind]]

    def missing(self, rows: Mapping[str, CachedRow]) -> list[CachedRow]:
        return [row for name, row in rows.items() if name not in self._shards]

    def fill(self, rows: Mapping[str, CachedRow], compute: Compute) -> None:
        """Computes what is missing. Ranks share the work; each has everything in the end.

        Args:
            compute: from a batch padded on the right and a mask [B, T], what `read` will return.

        Raises:
            RecipeError: the disk has too little space.
        """
        state = PartialState()
        one = self.missing(rows)[:1]
        position_bytes = sum(t[0].nbytes for t in compute(*_padded(one))) if one else 0
        line = self.plan(rows, position_bytes)
        if state.is_main_process:
            console.print(line, highlight=False, soft_wrap=True)
        everything = list(rows)
        mine = everything[state.process_index :: state.num_processes]
        # The second time: what other machines wrote to their own disks.
        for names in (mine, everything):
            self._build({name: rows[name] for name in names}, compute)
            state.wait_for_everyone()
            self._open_shards()

    def plan(self, rows: Mapping[str, CachedRow], position_bytes: int) -> str:
        """What a run wants, what it has and what it will write, in a line.

        Raises:
            RecipeError: the disk has too little space.
        """
        missing = self.missing(rows)
        needed = sum(row.positions for row in missing) * position_bytes
        existing = next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise RecipeError(
                f"train.reference_cache: {self.kind} needs {_size(needed)} in {self.folder}, where "
                f"{_size(free)} are free. Make room, name a folder on another disk with "
                "RINGFENCE_CACHE, or take top_k, or none"
            )
        positions = sum(row.positions for row in rows.values())
        return (
            f"reference cache: {counted(len(rows), 'row')}, {counted(positions, 'position')}, "
            f"{len(rows) - len(missing):,} rows are there; {_size(needed)} to write in "
            f"{self.folder}"
        )

    def _build(self, wanted: Mapping[str, CachedRow], compute: Compute) -> None:
        """Computes what is missing, in the batches of an empty cache: batching may change the last
        bit, and after a kill the states must be those of an uninterrupted run."""
        rows = list(wanted.values())
        known = {place for place, name in enumerate(wanted) if name in self._shards}
        if len(known) == len(rows):
            return
        make_cache(self.folder)
        about = json.dumps(self.about, indent=1)  # for people
        write_whole(self.folder / "about.json", about, is_shared=True)
        for file in self.folder.glob("*.part"):
            with suppress(FileNotFoundError):  # another rank or run has just finished it
                if time.time() - file.stat().st_mtime > _STALE:
                    file.unlink()
        shard: dict[str, Tensor] = {}
        with progress("reference cache", len(rows), len(known)) as advance:
            for places in length_batches([len(row) for row in rows], BATCH_TOKENS, known):
                part = [rows[place] for place in places]
                counts = [row.positions for row in part]
                pieces = [tensor.cpu().split(counts) for tensor in compute(*_padded(part))]
                for row, *tensors in zip(part, *pieces, strict=True):
                    for name, tensor in zip(PARTS[self.kind], tensors):
                        # safetensors would refuse a slice of a larger tensor.
                        shard[f"{row.name}.{name}"] = tensor.clone()
                size = sum(tensor.nbytes for tensor in shard.values())
                if len(shard) >= SHARD_ROWS or size >= SHARD_BYTES:
                    self._write(shard)
                    shard = {}
                advance(len(part))
        if shard:
            self._write(shard)

    def _write(self, shard: dict[str, Tensor]) -> None:
        """A file is there whole or not at all, under its own name: nobody writes into another's."""
        file = self.folder / f"{uuid.uuid4().hex}.part"
        try:
            save_file(shard, file, metadata={"reference": self.digest})
            with file.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(file, file.with_suffix(".safetensors"))
        except (OSError, SafetensorError) as error:
            file.unlink(missing_ok=True)
            raise RecipeError(
                f"train.reference_cache: {self.folder} cannot be written: {error}"
            ) from error

    def _open_shards(self) -> None:
        """Maps new files into memory. A damaged or foreign file is skipped with a warning: its rows
        are missing, and computed again."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name in self._seen:
                continue
            self._seen.add(file.name)
            try:
                shard = safe_open(file, framework="pt")
                if (shard.metadata() or {}).get("reference") != self.digest:
                    raise SafetensorError("it belongs to another cache")
                self._shards |= {name.rpartition(".")[0]: shard for name in shard.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                console.print(
                    f"reference cache: {file} is skipped: {error}", highlight=False, soft_wrap=True
                )


def _padded(rows: list[CachedRow]) -> tuple[Batch, Tensor]:
    """A batch padded on the right, and the mask [B, T] of the chosen places."""
    examples = [Example(row.ids_T.tolist(), [Role.RESPONSE] * len(row), "") for row in rows]
    batch = collate([[(example, False)] for example in examples], pad_id=0)
    mask_BT = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for place, row in enumerate(rows):
        mask_BT[place, : len(row)] = row.chosen_T
    return batch, mask_BT


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"
