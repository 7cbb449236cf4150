"""results.json: what was measured of a model, part by part. Its items are checked when it is read.
Imports no torch."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..errors import DataError, nearest
from ..runfolder.shapes import EVALUATE, read_shape
from ..util.strict_json import check_shape
from .config import MEASUREMENTS, measurement_of


class _Results(BaseModel):
    model_config = ConfigDict(strict=True)
    key: str
    parts: dict[str, Any]


def read_results(file: Path, again: str = EVALUATE) -> dict[str, Any]:
    """The results of one model.

    Raises:
        DataError: the file is damaged; the message names the field and how to recreate it
            (`again`).
    """
    results = read_shape(file, _Results, again)
    for name, part in results["parts"].items():
        measurement = measurement_of(name)
        if measurement is None:
            raise DataError(
                f"{file}: parts.{name}: no measurement has this name{nearest(name, MEASUREMENTS)}; "
                f"{again}"
            )
        check_shape(measurement.shape, part, str(file), again, ("parts", name))
        if wrong := measurement.complaint(part):
            raise DataError(f"{file}: parts.{name}: {wrong}; {again}")
    return results


def check_same_items(results: dict[str, Any], reference: dict[str, Any], folder: Path) -> None:
    """Raises DataError if the parts of a model and of its reference have different items."""
    again = f"delete {folder / 'results.json'}, and `ringfence evaluate` measures it again"
    for name in results.keys() | reference.keys():
        measurement = measurement_of(name)
        if measurement is None or not measurement.identity:  # shown, not compared
            continue
        if name not in results or name not in reference:
            lacking = "the reference was not" if name in results else "it was not"
            raise DataError(f"{folder}: {lacking} measured on {name!r}; {again}")
        asked = [sorted(measurement.identities(parts[name])) for parts in (results, reference)]
        if asked[0] != asked[1]:
            raise DataError(
                f"{folder}: {name!r} was measured on other questions than the reference; {again}"
            )
