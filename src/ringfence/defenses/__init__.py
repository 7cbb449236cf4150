"""One file per defense. A new defense is one new file and one line in `Defenses`."""

from copy import deepcopy
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from ..errors import RecipeError
from .ablation import Ablation
from .base import Defense, DefenseConfig, Setup, Training
from .frozen_prefix import FrozenPrefix
from .inoculation import Inoculation
from .interleave import Interleave
from .kl import KL
from .ldifs import LDIFS
from .safelora import SafeLoRA
from .scope import Scope
from .steering import Steering
from .stream_edit import clash
from .subspace_lock import SubspaceLock
from .treft import TReFT

# `defenses: auto`: the adapter acts only where the task is, and stays near the reference inside.
AUTO: dict[str, Any] = {"scope": {}, "kl": {"weight": 0.1, "every": 4}}


def spell_out(tree: Any) -> Any:
    """The defenses of a recipe as keys and values: `auto` is the set it stands for."""
    return deepcopy(AUTO) if tree == "auto" else tree


def or_auto(schema: dict[str, Any]) -> None:
    """Makes the JSON schema of a field accept `auto`, too."""
    schema["anyOf"] = [{"const": "auto"}, {"$ref": schema.pop("$ref")}]


class Defenses(BaseModel):
    """The defenses of a run, by name; any set may be combined, unless its checks refuse it."""

    model_config = ConfigDict(extra="forbid")

    kl: KL | None = None
    ldifs: LDIFS | None = None
    interleave: Interleave | None = None
    inoculation: Inoculation | None = None
    treft: TReFT | None = None
    safelora: SafeLoRA | None = None
    frozen_prefix: FrozenPrefix | None = None
    steering: Steering | None = None
    ablation: Ablation | None = None
    subspace_lock: SubspaceLock | None = None
    scope: Scope | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_empty_entry(cls, tree: Any) -> Any:
        tree = spell_out(tree)
        if isinstance(tree, str):
            raise ValueError(f"expected auto, or names with their fields, found {tree!r}")
        for name, config in tree.items() if isinstance(tree, dict) else ():
            if config is None and name in cls.model_fields:
                raise ValueError(
                    f"{name} has no fields: write `{name}: {{}}` for its defaults, or leave the "
                    "line out"
                )
        return tree

    @model_validator(mode="after")
    def _can_be_combined(self) -> Self:
        if (
            self.frozen_prefix
            and self.treft
            and (self.treft.is_auto or "prefix" in self.treft.tokens)
        ):
            raise ValueError(
                "frozen_prefix and treft on the prefix (or auto): a frozen prefix has no drift to "
                "penalise"
            )
        edits = [edit for edit in (self.steering, self.ablation) if edit]
        if edits and self.frozen_prefix:
            raise ValueError(
                "frozen_prefix with steering or ablation: they would edit what is frozen"
            )
        if reason := clash(edits):
            raise ValueError(reason)
        return self

    def build(self, setup: Setup) -> list[Defense]:
        return [config.build(setup) for config in self.configs()]

    def configs(self) -> list[DefenseConfig]:
        return [
            config
            for name in type(self).model_fields
            if (config := getattr(self, name)) is not None
        ]

    def refusal(self, training: Training) -> str | None:
        """Why one of them cannot be used in this kind of training; None if all can."""
        return next(
            (reason for config in self.configs() if (reason := config.refuses(training))), None
        )

    def resolved(self, role: str) -> Self:
        """The same, with the role that a pilot chose in place of auto."""
        chosen = {
            name: config.resolve(role)
            for name in type(self).model_fields
            if (config := getattr(self, name)) and config.is_auto
        }
        return self.model_copy(update=chosen)

    @classmethod
    def of(cls, configs: list[DefenseConfig]) -> "Defenses":
        """From a list of configs, as Python users write it: `[KL(weight=0.3), TReFT()]`."""
        names = {get_args(field.annotation)[0]: name for name, field in cls.model_fields.items()}
        by_name = {names[type(config)]: config for config in configs}
        if len(by_name) < len(configs):
            raise RecipeError(
                f"defenses: one of each kind, found {[type(config).__name__ for config in configs]}"
            )
        return cls.model_validate(by_name)


__all__ = [
    "KL",
    "LDIFS",
    "Ablation",
    "Defense",
    "DefenseConfig",
    "Defenses",
    "FrozenPrefix",
    "Inoculation",
    "Interleave",
    "SafeLoRA",
    "Scope",
    "Setup",
    "Steering",
    "SubspaceLock",
    "TReFT",
    "Training",
]
