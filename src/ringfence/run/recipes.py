"""The recipe that `ringfence init` writes, made from the schema so that it cannot drift from it.

Shipped data are in `shipped/`.
"""

import math
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..defenses import AUTO, Defenses
from ..util.strict_yaml import dump
from .config import Recipe, parse_recipe

_HEAD = """\
# A ringfence recipe: every field, at its default or as it was set for your rows.
# Leave out what you do not change.
# Check it:   ringfence run {0} --dry-run
# Run it:     ringfence run {0}
# Change it:  ringfence run {0} train.epochs=2 defenses.kl.weight=0.3
"""
FEWEST_ROWS = 24  # fewer, a tenth of them held out, do not say where the task is
FEW_ROWS = 800  # fewer are trained on in smaller batches, and up to four times


def commented_recipe(
    name: str = "recipe.yaml", train: str | None = None, rows: int = FEW_ROWS
) -> str:
    """YAML of the default recipe, each field with what it means, with `defenses: auto`; the others
    are commented out.

    Args:
        train: the user's own rows, a tenth of which measures what is learnt; default: shipped rows.
        rows: how many there are. A small number is trained on more often, in smaller batches: 40
            rows in batches of 16 are three steps, which teach almost nothing.
    """
    # Not resolved: what is null depends on the rows that are named later.
    recipe = Recipe.model_construct()
    if train is not None:
        few = {"epochs": min(4, math.ceil(160 / max(rows, 1))), "batch_size": 8}
        tree: dict[str, Any] = {"data": {"train": train}, "output": f"runs/{_stem(train)}"}
        recipe = parse_recipe(tree | {"train": few if rows < FEW_ROWS else {}})
    start = "auto" if train is None or rows >= FEWEST_ROWS else "{kl: {weight: 0.3}}"
    lines = _HEAD.format(name).splitlines()
    for field, info in Recipe.model_fields.items():
        value = getattr(recipe, field)
        lines += [
            "",
            *(_defenses(start) if field == "defenses" else _field(field, info, value, "")),
        ]
    return "\n".join(lines) + "\n"


def _stem(source: str) -> str:
    """A name for the run folder of a file or a hub data set."""
    name = Path(source).stem if Path(source).suffix else source.partition("@")[0].rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"


def _defenses(start: str) -> list[str]:
    lines = [
        f"# auto is {_value(AUTO)}: the adapter acts only on requests like",
        "# your rows' (scope), and stays near the model before fine-tuning there (kl).",
        f"# For any other set, replace {start} by nothing, and uncomment what you want.",
        f"defenses: {start}",
    ]
    for name, info in Defenses.model_fields.items():
        config = next(kind for kind in info.annotation.__args__ if kind is not type(None))  # type: ignore[union-attr]
        lines.append(f"#  {name}:  # {(config.__doc__ or '').strip().splitlines()[0]}")
        for field, field_info in config.model_fields.items():
            shown = _field(field, field_info, field_info.get_default(), "    ")
            lines += ["#" + line for line in shown]
    return lines


def _field(name: str, info: FieldInfo, value: Any, indent: str) -> list[str]:
    if isinstance(value, BaseModel):
        lines = [f"{indent}# {' '.join((type(value).__doc__ or '').split())}", f"{indent}{name}:"]
        for part, part_info in type(value).model_fields.items():
            shown = getattr(value, part)
            if part not in value.model_fields_set and not isinstance(shown, BaseModel):
                shown = part_info.get_default()  # auto, not what it means on this machine
            lines += _field(part, part_info, shown, indent + "  ")
        return lines
    comment = f"  # {info.description}" if info.description else ""
    return [f"{indent}{name}: {_value(value)}{comment}"]


def _value(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
