"""What is measured: all measurements, and the `evaluate` part of a recipe, with their fields."""

from importlib import import_module

from pydantic import Field

from ..util.strict_yaml import Whole
from .measures.base import Fields, Measurement

# Files of `measures/`, in the order of results, tables and exports.
NAMES = (
    "pairs",
    "scope",
    "fluency",
    "opswap",
    "behaviours",
    "held_out",
    "samples",
    "answers",
    "cost",
)
MEASUREMENTS: dict[str, Measurement] = {
    name: import_module(f".measures.{name}", __package__).MEASUREMENT for name in NAMES
}
# The fields of the last base of a class come first.
_FIELDS = [m.fields for m in reversed(MEASUREMENTS.values()) if m.fields is not Fields]


class EvaluateConfig(*_FIELDS):  # type: ignore[misc]
    """What is measured after training. Sources of paired questions are as in `data`, or lists of
    them."""

    batch_tokens: Whole = Field(
        4096,
        ge=64,
        le=2**30,
        description="tokens in one batch; a CPU scores at most 1,024 at once",
    )


def measurement_of(part: str) -> Measurement | None:
    """The measurement that a part of results.json belongs to."""
    return next((found for found in MEASUREMENTS.values() if found.owns(part)), None)
