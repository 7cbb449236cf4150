"""Merges runs of one recipe that differ in their seed: means, with intervals over seeds and
questions. Never imports torch."""

import json
from dataclasses import fields, is_dataclass, replace
from typing import Any

from ..evaluate.config import MEASUREMENTS
from ..evaluate.measures.base import Measurement
from ..evaluate.measures.pairs import SETS
from ..runfolder.record import Records
from ..stats import Interval, over_seeds
from .summary import Summary, asked_of


def by_recipe(runs: list[Records]) -> list[list[Records]]:
    """Groups runs whose recipes differ only in seed (and output), ordered by their first runs."""
    groups: dict[Any, list[Records]] = {}
    for run in runs:
        recipe = {key: value for key, value in run.recipe.items() if key != "output"}
        seed = recipe.pop("seed", None)
        # Questions are in files: runs of one recipe may have been measured on different ones.
        asked = tuple((name, items) for name, items in asked_of(run).items() if name in SETS)
        key = (json.dumps(recipe, sort_keys=True, default=str), frozenset(asked))
        taken = {other.recipe.get("seed") for other in groups.get(key, [])}
        # A seed that repeats is the same run; without training it is an evaluation of some model.
        groups.setdefault(key if run.training and seed not in taken else run.folder, []).append(run)
    return list(groups.values())


def over_runs(rows: list[Summary]) -> Summary:
    """The summaries of runs of one recipe as one (`stats.over_seeds`)."""
    first = rows[0]
    if len(rows) == 1:
        return first
    shared = [name for name in first.found if all(name in row.found for row in rows)]
    return replace(
        first,
        name=f"{first.name} ({len(rows)} seeds)",
        found={
            name: _joined([row.found[name] for row in rows], MEASUREMENTS[name]) for name in shared
        },
        seeds=len(rows),
        seed_values=tuple(seed for row in rows for seed in row.seed_values),
    )


def _joined(values: list[Any], of: Measurement, path: str = "") -> Any:
    """Joins values into one: intervals over seeds, means of numbers, the largest p-value, the first
    text or count."""
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, Interval):
        found = over_seeds(values)
        if not of.is_share(path):
            return found
        return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))
    if is_dataclass(first):
        parts = {
            part.name: [getattr(value, part.name) for value in values] for part in fields(first)
        }
        joined = {name: _joined(found, of, f"{path}.{name}") for name, found in parts.items()}
        return replace(first, **joined)  # type: ignore[type-var]
    if isinstance(first, dict):
        shared = [key for key in first if all(key in value for value in values)]
        return {
            key: _joined([value[key] for value in values], of, f"{path}.{key}") for key in shared
        }
    if isinstance(first, list) and first and is_dataclass(first[0]):
        return [_joined(list(found), of, path) for found in zip(*values)]
    if isinstance(first, bool):
        return any(values)
    if isinstance(first, float):
        return max(values) if path.endswith(".p") else sum(values) / len(values)
    return first
