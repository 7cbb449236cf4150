"""One file per defense. A new defense is one new file and one line in `Defenses`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from ..errors import RecipeError
from .base import Defense, DefenseConfig, Setup
from .interleave import Interleave
from .kl import KL
from .treft import TReFT


class Defenses(BaseModel):
    """The defenses of a run, by name; any set may stand together."""

    model_config = ConfigDict(extra="forbid")

    kl: KL | None = None
    interleave: Interleave | None = None
    treft: TReFT | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_empty_entry(cls, tree: Any) -> Any:
        for name, config in tree.items() if isinstance(tree, dict) else ():
            if config is None and name in cls.model_fields:
                raise ValueError(f"{name} has no fields: write `{name}: {{}}` for its defaults, or leave the line out")
        return tree

    def build(self, setup: Setup) -> list[Defense]:
        return [config.build(setup) for config in self.configs()]

    def configs(self) -> list[DefenseConfig]:
        return [config for name in type(self).model_fields if (config := getattr(self, name)) is not None]

    @classmethod
    def of(cls, configs: list[DefenseConfig]) -> "Defenses":
        """From a list of configs, as Python users write it: `[KL(weight=0.3), TReFT()]`."""
        by_name = {type(config).__name__.lower(): config for config in configs}
        if len(by_name) < len(configs):
            raise RecipeError(f"defenses: one of each kind, found {[type(config).__name__ for config in configs]}")
        return cls.model_validate(by_name)


__all__ = ["KL", "Defense", "DefenseConfig", "Defenses", "Interleave", "Setup", "TReFT"]
