"""Subspace lock (ours): what layers write to the stream along given directions stays fixed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field, field_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import DefenseError
from ..model.directions import Directions
from ..model.layers import causal_lm, decoder_layers
from ..model.sharding import whole, write
from ..util.strict_yaml import Layer
from .base import TAKES_THE_BASE, UNDONE, Defense, DefenseConfig, Setup, Training


class SubspaceLock(DefenseConfig):
    """Q^T (W - W0) = 0 for every weight W that writes to the residual stream in a layer.

    Q spans the given directions of that layer; restored after every optimiser step.
    """

    vectors: str = Field(
        "vectors.safetensors", description="file of directions (see ringfence persona extract)"
    )
    layers: tuple[Layer, ...] | None = Field(
        None, min_length=1, description="layers whose writes are locked, from 1; null = all"
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _one_layer(cls, layers: Any) -> Any:
        return (layers,) if isinstance(layers, int) else layers

    def refuses(self, training: Training) -> str | None:
        if training.further:
            return f"subspace_lock {TAKES_THE_BASE}"
        return f"subspace_lock: {UNDONE}" if training.deepspeed is not None else None

    def build(self, setup: Setup) -> "SubspaceLockDefense":
        return SubspaceLockDefense(self)


class SubspaceLockDefense(Defense):
    """Projects after each step: an optimiser's moments push even if the gradient is projected."""

    name = "subspace_lock"

    def __init__(self, config: SubspaceLock) -> None:
        self.directions = Directions.load(Path(config.vectors))
        self.layers = self.directions.chosen(self.name, config.layers)
        self._locks: list[_Lock] = []

    def start(self, model: Any) -> None:
        """Finds the weights to lock and remembers Q^T W0.

        Raises:
            ModelError: the directions do not fit the model.
            DefenseError: no trained weight writes to the stream, or one that does cannot be locked.
        """
        self.directions.check(model)
        writers = find_writers(model, self.layers)
        self._locks = [
            lock
            for layer in self.layers
            for name, module in writers[layer].items()
            for lock in _locks(f"layer {layer}, {name}", module, self.directions.basis(layer))
        ]
        if not self._locks:
            raise DefenseError(
                "defenses.subspace_lock: no trained weight writes to the residual stream in its "
                "layers"
            )

    def after_step(self, model: Any, step: int) -> None:
        self._restore()

    def finish(self, model: Any) -> None:
        self._restore()  # other defenses may have changed the weights since the last step

    def _restore(self) -> None:
        with torch.no_grad():
            for lock in self._locks:
                lock.restore()

    def record(self) -> dict[str, Any]:
        return {
            "trait": self.directions.trait,
            "layers": len(self.layers),
            "locked_tensors": len(self._locks),
        }


class _Lock:
    """Keeps Q^T W of a trained tensor at its first value, or at zero if the tensor is an update."""

    def __init__(
        self, owner: nn.Module, name: str, basis_DR: Tensor, is_update: bool = False
    ) -> None:
        # The owner, not the tensor: loading a checkpoint may put another tensor in its place.
        self._owner, self._name = owner, name
        self._basis_DR = basis_DR.to(self._weight().device)
        now = self._basis_DR.T @ self._weight().float()
        self._target = torch.zeros_like(now) if is_update else now

    def _weight(self) -> Tensor:
        """[out, in], or [out] for a bias."""
        weight: Tensor = getattr(self._owner, self._name).detach()
        return weight.T if isinstance(self._owner, Conv1D) and weight.ndim == 2 else weight

    def restore(self) -> None:
        """W <- W - Q (Q^T W - target)."""
        weight = self._weight()
        now = whole(weight)
        basis_DR, target = self._basis_DR.to(now.device), self._target.to(now.device)
        drift = basis_DR.T @ now.float() - target
        write(weight, now - (basis_DR @ drift).to(now.dtype))


def _locks(place: str, writer: nn.Module, basis_DR: Tensor) -> Iterator[_Lock]:
    """A lock for each trained tensor through which the writer's output can change.

    With LoRA the output changes by B A x, so only the span of B matters, whatever A is.
    """
    for path, parameter in writer.named_parameters():
        owner, name = writer.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if not parameter.requires_grad or "lora_A" in path:
            continue
        if "lora_B" in path:
            along_RK = basis_DR.to(parameter.device).T @ parameter.detach().float()
            if float(along_RK.abs().max()) > 1e-5:
                raise DefenseError(
                    f"defenses.subspace_lock: {place}: the adapter already writes along the "
                    "directions; merge it into its base first"
                )
            yield _Lock(owner, name, basis_DR, is_update=True)
        elif isinstance(owner, nn.Linear | Conv1D) and name in ("weight", "bias"):
            yield _Lock(owner, name, basis_DR)
        else:
            raise DefenseError(
                f"defenses.subspace_lock: {place} trains {path!r}, which it cannot lock (accepted: "
                "full fine-tuning, or LoRA without DoRA)"
            )


# ------------------------------------------------------------------ which weights write


def find_writers(model: Any, layers: list[int]) -> dict[int, dict[str, nn.Module]]:
    """For each layer, the linear modules whose outputs it adds to the residual stream, by name.

    They are found by what they do, not by name: on a few tokens, the difference between a layer's
    output and its input is fitted by the outputs of its linear modules of that width; all writers
    get the same factor (1 in most models), all others get zero. Each number is weighted by its
    rounding error, because the streams of trained models have a few huge entries.

    Raises:
        DefenseError: nothing fits, because a norm or a mixture of experts is between weights and
            stream.
    """
    with torch.no_grad(), _eval(model), _watched(model, layers) as seen:
        # The decoder alone: hooks on the whole model may expect real prompts.
        causal_lm(model).get_decoder()(
            torch.arange(1, 17, device=model.device)[None], use_cache=False
        )
    return {layer: _writers(layer, decoder_layers(model)[layer - 1], seen) for layer in layers}


def _writers(layer: int, block: nn.Module, seen: dict[Any, Any]) -> dict[str, nn.Module]:
    added_TD, rounding_TD = seen[block]
    tolerance_TD = MISFIT * added_TD.abs().median(-1, keepdim=True).values + rounding_TD
    linears = {
        name: module
        for name, module in block.named_modules()
        if module is not block and module in seen and seen[module].shape == added_TD.shape
    }
    outputs_NM = torch.stack(
        [(seen[module] / tolerance_TD).flatten() for module in linears.values()], 1
    )
    target_N = (added_TD / tolerance_TD).flatten()
    factors_M = torch.linalg.lstsq(outputs_NM, target_N[:, None]).solution[:, 0]
    writes = factors_M.abs() > 0.5 * factors_M.abs().max()
    rest_N = target_N - outputs_NM[:, writes] @ factors_M[writes]
    if float(rest_N.square().mean()) > 1:
        raise DefenseError(
            f"defenses.subspace_lock: layer {layer} ({type(block).__name__}): what it adds to the "
            "residual stream is not the sum of the outputs of its linear modules (a norm or "
            "experts are between): its weights cannot be locked"
        )
    return {
        name: module
        for (name, module), is_writer in zip(linears.items(), writes.tolist())
        if is_writer
    }


# What the fit may leave beyond rounding, in shares of a typical entry; a norm or a missing module
# leaves far more.
MISFIT = 0.02


@contextmanager
def _eval(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _watched(model: Any, layers: list[int]) -> Iterator[dict[Any, Any]]:
    """Collects, as [T, D] in float64, each layer's output minus input with its rounding error, and
    the output of each linear module in it."""
    seen: dict[Any, Any] = {}

    def keep_added(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        into = args[0] if args else kwargs["hidden_states"]
        out = output if isinstance(output, Tensor) else output[0]
        before_TD, after_TD = (end[0].cpu().double() for end in (into, out))
        rounding_TD = torch.finfo(out.dtype).eps / 4 * (before_TD.abs() + after_TD.abs())
        seen[module] = (after_TD - before_TD, rounding_TD)

    def keep_output(module: Any, _args: Any, output: Any) -> None:
        seen[module] = output.cpu().double().squeeze(0)

    handles = []
    for number in layers:
        block = decoder_layers(model)[number - 1]
        handles.append(block.register_forward_hook(keep_added, with_kwargs=True))
        for name, module in block.named_modules():
            if _is_linear(module) and not {"base_layer", "lora_A", "lora_B"} & {*name.split(".")}:
                handles.append(module.register_forward_hook(keep_output))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _is_linear(module: nn.Module) -> bool:
    """A linear module, or an adapter around one."""
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(inner, nn.Linear | Conv1D)
