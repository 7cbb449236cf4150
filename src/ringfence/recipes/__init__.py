"""The recipe that `ringfence init` writes, made from the schema so that it cannot drift from it.

Shipped data stand in `data/`.
"""

from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..config import Recipe
from ..defenses import Defenses

_HEAD = """\
# A ringfence recipe. Every field is shown with its default; leave out what you do not change.
# Check it:   ringfence run {0} --dry-run
# Run it:     ringfence run {0}
# Change it:  ringfence run {0} train.epochs=2 defenses.kl.weight=0.3
"""


def commented_recipe(name: str = "recipe.yaml") -> str:
    """YAML of the default recipe, each field with what it means; the defenses stand commented out."""
    lines = _HEAD.format(name).splitlines()
    for field, info in Recipe.model_fields.items():
        lines.append("")
        lines += _defenses() if field == "defenses" else _field(field, info, getattr(Recipe(), field), "")
    return "\n".join(lines) + "\n"


def _defenses() -> list[str]:
    lines = ["# Any set of defenses; uncomment what you want.", "defenses: {}"]
    for name, info in Defenses.model_fields.items():
        config = next(kind for kind in info.annotation.__args__ if kind is not type(None))  # type: ignore[union-attr]
        lines.append(f"#  {name}:  # {(config.__doc__ or '').strip().splitlines()[0]}")
        for field, field_info in config.model_fields.items():
            lines += ["#" + line for line in _field(field, field_info, field_info.get_default(), "    ")]
    return lines


def _field(name: str, info: FieldInfo, value: Any, indent: str) -> list[str]:
    if isinstance(value, BaseModel):
        lines = [f"{indent}# {' '.join((type(value).__doc__ or '').split())}", f"{indent}{name}:"]
        for part, part_info in type(value).model_fields.items():
            lines += _field(part, part_info, getattr(value, part), indent + "  ")
        return lines
    comment = f"  # {info.description}" if info.description else ""
    return [f"{indent}{name}: {_value(value)}{comment}"]


def _value(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
