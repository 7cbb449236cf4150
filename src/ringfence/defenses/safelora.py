"""SafeLoRA (Hsu et al., NeurIPS 2024): projects changes unlike those of alignment onto them."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from ..errors import DefenseError
from ..model.checkpoint import Checkpoint
from ..model.projection import (
    Projected,
    ProjectionRule,
    Update,
    as_json,
    check,
    project_updates,
)
from ..model.sharding import gathered
from ..util.strict_yaml import Whole
from .base import TAKES_THE_BASE, UNDONE, Defense, DefenseConfig, Setup, Training


class SafeLoRA(ProjectionRule, DefenseConfig):
    """For each fine-tuned weight: where cos(C dW, dW) is at most the threshold, dW becomes C dW.

    C = V V^T / |V|, V = W_aligned - W_base. No penalty: the weights are changed after training, or
    every few steps.
    """

    base: str | None = Field(
        None,
        description="required: the pre-trained model before its alignment, a local folder or "
        "hub id",
    )
    reference: str | None = Field(
        None, description="the aligned model; without it, the recipe's model"
    )
    interval: Whole | None = Field(
        None,
        ge=1,
        le=10**9,
        description="project every `interval` optimiser steps and at the end; without it, only at "
        "the end",
    )

    def refuses(self, training: Training) -> str | None:
        if training.further:
            return f"safelora {TAKES_THE_BASE}"
        if training.deepspeed == 3 and training.method == "full":
            return (
                "safelora: with train.method: full it would need all weights whole at once "
                "(DeepSpeed ZeRO-3)"
            )
        is_undone = training.deepspeed is not None and self.interval
        return f"safelora.interval: {UNDONE}" if is_undone else None

    def build(self, setup: Setup) -> "SafeLoRADefense":
        if not self.base:
            raise DefenseError(
                "defenses.safelora: base is missing; name the pre-trained model before its "
                "alignment (a local folder or hub id)"
            )
        reference = Checkpoint(self.reference or setup.model)
        return SafeLoRADefense(self, Checkpoint(self.base), reference)


class SafeLoRADefense(Defense):
    name = "safelora"

    def __init__(self, config: SafeLoRA, base: Checkpoint, reference: Checkpoint) -> None:
        self.config, self.base, self.reference = config, base, reference
        self.layers: dict[str, Projected] = {}
        self._is_due = True

    def start(self, model: Any) -> None:
        check(_updates(model), self.base, self.reference, self.config)

    def after_step(self, model: Any, step: int) -> None:
        self._is_due = True
        if self.config.interval and step % self.config.interval == 0:
            self._project(model)

    def finish(self, model: Any) -> None:
        # C is not idempotent: what the last step projected must not be projected again.
        if self._is_due:
            self._project(model)

    def state_dict(self) -> dict[str, Any]:
        return {"is_due": self._is_due, "layers": as_json(self.layers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._is_due = state["is_due"]
        self.layers = {name: Projected(**layer) for name, layer in state["layers"].items()}

    def record(self) -> dict[str, Any]:
        """Of the last projection: the number of weights projected, and the cosine and kept share of
        the norm of each."""
        return {
            "projected": sum(layer.projected for layer in self.layers.values()),
            "weights": as_json(self.layers),
        }

    def _project(self, model: Any) -> None:
        with gathered((p for p in model.parameters() if p.requires_grad), written=True):
            self.layers = project_updates(_updates(model), self.base, self.reference, self.config)
        self._is_due = False


def _updates(model: Any) -> list[Update]:
    """What is fine-tuned in a model: LoRA's pairs, or all linear layers but the head.

    Raises:
        DefenseError: something is trained that cannot be projected and would slip through.
    """
    is_adapted = hasattr(model, "peft_config")
    found = list(_lora_updates(model) if is_adapted else _dense_updates(model))
    seen = {id(parameter) for _, parameters in found for parameter in parameters}
    for name, parameter in model.named_parameters():
        # Full fine-tuning moves norms, biases, embeddings and the head as well; the method leaves
        # them alone.
        is_left = parameter.requires_grad and id(parameter) not in seen
        if is_left and (is_adapted or parameter.ndim > 2):
            raise DefenseError(
                f"defenses.safelora: {name} is trained but cannot be projected (accepted: LoRA on "
                "linear layers, or full fine-tuning of a model whose weights have two dimensions)"
            )
    return [update for update, _ in found]


def _lora_updates(model: Any) -> Iterator[tuple[Update, list[Tensor]]]:
    from peft.tuners.lora import LoraLayer

    adapter = model.active_adapter
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            parts: list[Any] = [module.lora_A[adapter], module.lora_B[adapter]]
            a, b = (part.weight for part in parts)
            if a.ndim == 2:
                transposed = getattr(module, "fan_in_fan_out", False)
                yield Update(f"{name}.weight", b.data, a.data, transposed), [a, b]


def _dense_updates(model: Any) -> Iterator[tuple[Update, list[Tensor]]]:
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings():
            transposed = isinstance(module, Conv1D)
            weight = module.weight.data.T if transposed else module.weight.data
            yield Update(f"{name}.weight", weight, None, transposed), [module.weight]
