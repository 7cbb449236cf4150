"""SafeLoRA's mathematics (NeurIPS 2024, Hsu et al.): projects the change of a weight on what
alignment changed.

For a weight, V = W_aligned - W_base is what alignment changed (W_aligned is the reference's
weight), and dW is what fine-tuning has changed since: B A for LoRA (without its scale, which does
not affect a cosine) or W - W_aligned for full fine-tuning. If dW is unlike its projection C dW, the
projection replaces it. Weights are read one at a time, by name; no [out, out] matrix is made if out
> in. Does not know models in memory, training or recipes.

Letters: O = out, I = in, R = rank of the adapter, X = R or I, K = directions that are kept.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ModelError, RecipeError
from ..util.console import progress
from ..util.files import write_whole
from ..util.strict_yaml import Real, Whole
from .checkpoint import Checkpoint
from .files import check_adapter, named_base
from .precision import device
from .sharding import whole, write

Projector = Literal["scaled", "exact"]

THRESHOLD = 0.3
REPORT = "safelora.json"
_ADAPTER = "adapter_model.safetensors"
_KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")


class ProjectionRule(BaseModel):
    """Which weights are projected, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    threshold: Real | None = Field(
        None,
        ge=0,
        le=1,
        description="project where the cosine is at most this (default 0.3, unless lowest is set)",
    )
    lowest: Whole | None = Field(
        None,
        ge=1,
        le=10**9,
        description="instead: project this number of weights, those of least cosine",
    )
    projector: Projector = Field(
        "scaled",
        description="scaled = V V^T / |V| (as published), "
        "exact = the orthogonal projector on V's columns",
    )
    tolerance: Real = Field(
        0.01,
        gt=0,
        lt=1,
        description="projector exact leaves out singular values of V below this times the largest",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_of_two(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        threshold, lowest = tree.get("threshold"), tree.get("lowest")
        if threshold is None and lowest is None:
            return {**tree, "threshold": THRESHOLD}
        if threshold is not None and lowest is not None:
            raise ValueError(
                f"set threshold or lowest, not both (found threshold {threshold}, lowest {lowest})"
            )
        return tree


# ---------------------------------------------------------------- one weight


def project_matrix(
    matrix_OX: Tensor,
    difference_OI: Tensor,
    projector: Projector = "scaled",
    tolerance: float = 0.01,
) -> Tensor:
    """C times a matrix, in the matrix's shape; V is `difference_OI`, not zero.

    - scaled: C = V V^T / ||V||_F, which not only projects but also shrinks (its size follows that
      of V).
    - exact: C = V (V^T V)^+ V^T, the orthogonal projector on the column space of V, without
      directions whose singular value is below `tolerance` times the largest. If V has full rank and
      out <= in, it is the identity.
    """
    if projector == "exact":
        basis_OK = column_space(difference_OI, tolerance)
        return basis_OK @ (basis_OK.T @ matrix_OX)
    out, into = difference_OI.shape
    # The order of the products decides the size of what is in between: [in, X], or [out, out] if
    # that is smaller.
    if into * matrix_OX.shape[1] <= out * out:
        product_OX = difference_OI @ (difference_OI.T @ matrix_OX)
    else:
        product_OX = (difference_OI @ difference_OI.T) @ matrix_OX
    return product_OX / difference_OI.norm()


def column_space(difference_OI: Tensor, tolerance: float) -> Tensor:
    """Orthonormal columns [O, K] that span the columns of V, by its singular value
    decomposition."""
    left_OM, values_M, _ = torch.linalg.svd(difference_OI, full_matrices=False)
    return left_OM[:, values_M > tolerance * values_M[0]]


def likeness(
    projected_OX: Tensor, matrix_OX: Tensor, gram_XX: Tensor | None = None
) -> tuple[float, float]:
    """Cosine of vec(C dW) and vec(dW), and ||C dW|| / ||dW||.

    For LoRA, dW = B A is never made: with `matrix_OX` = B and `gram_XX` = A A^T, <B1 A, B2 A> =
    <B1^T B2, A A^T>. A zero update has cosine 1 and ratio 1; one that the projection makes zero has
    cosine 0.
    """

    def inner(left_OX: Tensor, right_OX: Tensor) -> float:
        product = left_OX * right_OX if gram_XX is None else (left_OX.T @ right_OX) * gram_XX
        return max(product.sum().item(), 0.0)

    whole, part, both = (
        inner(matrix_OX, matrix_OX),
        inner(projected_OX, projected_OX),
        inner(projected_OX, matrix_OX),
    )
    if not whole:
        return 1.0, 1.0
    return (min(both / (part * whole) ** 0.5, 1.0) if part else 0.0), (part / whole) ** 0.5


# ---------------------------------------------------------------- all weights


@dataclass(frozen=True)
class Update:
    """The change of one weight by fine-tuning.

    Attributes:
        name: the weight's name in the checkpoints.
        tensor_OX: LoRA's B, or the whole fine-tuned weight; written in place.
        lora_A_RI: LoRA's A, or None for a whole weight.
        transposed: the checkpoints hold the weight as [in, out] (GPT-2's Conv1D).
    """

    name: str
    tensor_OX: Tensor
    lora_A_RI: Tensor | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape in the checkpoints."""
        right = self.tensor_OX if self.lora_A_RI is None else self.lora_A_RI
        out, into = self.tensor_OX.shape[0], right.shape[1]
        return (into, out) if self.transposed else (out, into)


@dataclass(frozen=True)
class Projected:
    """Result for one weight: cosine of C dW and dW, ||C dW|| / ||dW||, and whether C dW replaced
    dW."""

    cosine: float
    kept: float
    projected: bool


def check(
    updates: Sequence[Update], base: Checkpoint, reference: Checkpoint, rule: ProjectionRule
) -> None:
    """Checks everything that can be wrong before any weight is projected; reads headers and a few
    rows.

    Raises:
        ModelError: a weight is missing from a checkpoint, has another shape there, or is the same
            in both.
        RecipeError: `lowest` exceeds the number of weights.
    """
    if rule.lowest and rule.lowest > len(updates):
        raise RecipeError(
            f"lowest: found {rule.lowest}, but only {len(updates)} weights were fine-tuned"
        )
    for update in updates:
        for checkpoint in (reference, base):
            found = checkpoint.shape(update.name)
            if found != update.shape:
                raise ModelError(
                    f"{checkpoint.model}: {update.name} is {list(found)} there, but the fine-tuned "
                    f"weight is {list(update.shape)}: another model"
                )
    same = [update.name for update in updates if _same(update.name, base, reference)]
    if len(same) == len(updates):
        raise ModelError(
            f"base {base.model} and reference {reference.model} are the same in all {len(same)} "
            "weights; expected as base the pre-trained model before its alignment"
        )
    if same:
        raise ModelError(
            f"base {base.model} and reference {reference.model} are the same in {len(same)} of "
            f"{len(updates)} weights (first: {same[0]}), so that alignment has no direction there; "
            "fine-tune the other weights only"
        )


def _same(name: str, base: Checkpoint, reference: Checkpoint) -> bool:
    if not torch.equal(base.first_rows(name).float(), reference.first_rows(name).float()):
        return False
    return torch.equal(base.read(name).float(), reference.read(name).float())


@torch.no_grad()
def project_updates(
    updates: Sequence[Update],
    base: Checkpoint,
    reference: Checkpoint,
    rule: ProjectionRule,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Projected]:
    """Projects the updates that the rule chooses, in place; see `check` for what must hold.

    Keeps one weight at a time, on the update's device in float32; with `lowest`, also that number
    of projected tensors.

    Raises:
        ModelError: an update is not finite.
    """
    layers: dict[str, Projected] = {}
    waiting: list[tuple[float, Update, Tensor]] = []
    for update in updates:
        new_OX, cosine, kept = _project_update(update, base, reference, rule)
        is_below = rule.threshold is not None and cosine <= rule.threshold
        if is_below:
            write(update.tensor_OX, new_OX)
        elif rule.lowest:
            waiting = sorted([*waiting, (cosine, update, new_OX)], key=lambda item: item[0])[
                : rule.lowest
            ]
        layers[update.name] = Projected(cosine, kept, is_below)
        advance(1)
    for _, update, new_OX in waiting:
        write(update.tensor_OX, new_OX)
        layers[update.name] = replace(layers[update.name], projected=True)
    return layers


def _project_update(
    update: Update, base: Checkpoint, reference: Checkpoint, rule: ProjectionRule
) -> tuple[Tensor, float, float]:
    """The tensor to replace the update, the cosine, and the share of the norm that is kept."""
    place = update.tensor_OX.device
    reference_OI, base_OI = (
        weight.T if update.transposed else weight
        for weight in (checkpoint.read(update.name).to(place) for checkpoint in (reference, base))
    )
    difference_OI = reference_OI.to(torch.float32, copy=True).sub_(base_OI)
    matrix_OX = whole(update.tensor_OX).float()
    if update.lora_A_RI is None:
        matrix_OX = matrix_OX - reference_OI
        gram_RR = None
    else:
        a_RI = whole(update.lora_A_RI).float()
        gram_RR = a_RI @ a_RI.T
    projected_OX = project_matrix(matrix_OX, difference_OI, rule.projector, rule.tolerance)
    cosine, kept = likeness(projected_OX, matrix_OX, gram_RR)
    if not math.isfinite(kept):
        raise ModelError(
            f"{update.name}: its update, or its weight in base or reference, is not finite"
        )
    return (projected_OX + reference_OI if gram_RR is None else projected_OX), cosine, kept


# ---------------------------------------------------------------- an adapter's folder


def project_adapter(
    adapter: Path,
    output: Path,
    base: str,
    reference: str | None,
    rule: ProjectionRule,
) -> dict[str, Projected]:
    """Projects a finished peft LoRA adapter into a new folder, with a `safelora.json` of every
    weight's cosine.

    Args:
        adapter: its folder, which is not changed.
        output: the new folder, which must not exist.
        base: the pre-trained model before its alignment.
        reference: the aligned model that the adapter was trained on; None: the one the adapter
            names.

    Raises:
        ModelError: the folder holds no LoRA adapter of linear layers, or one that does not fit the
            models.
        RecipeError: `output` exists, or `lowest` exceeds the number of weights.
    """
    if output.exists():
        raise RecipeError(f"output: {output} exists already; name another folder")
    tensors, updates, named = read_adapter(adapter)
    reference = reference or named
    if not reference:
        raise RecipeError(
            f"reference: {adapter} does not name the model that it was trained on; name it"
        )
    base_weights, reference_weights = Checkpoint(base), Checkpoint(reference)
    check(updates, base_weights, reference_weights, rule)
    with progress("SafeLoRA", len(updates)) as advance:
        layers = project_updates(updates, base_weights, reference_weights, rule, advance)
    output.mkdir(parents=True)
    for file in adapter.iterdir():
        if file.suffix in _KEPT_SUFFIXES and file.is_file():
            shutil.copy(file, output)
    save_file(tensors, output / _ADAPTER, metadata={"format": "pt"})
    report = {"base": base, "reference": reference, **rule.model_dump(), "weights": as_json(layers)}
    write_whole(output / REPORT, json.dumps(report, indent=1))
    return layers


def as_json(layers: dict[str, Projected]) -> dict[str, dict[str, Any]]:
    """Plain JSON values, by weight."""
    return {name: asdict(layer) for name, layer in layers.items()}


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], list[Update], str | None]:
    """The tensors in an adapter's folder, the updates (views of them), and the base model that it
    names."""
    config = check_adapter(folder)
    tensors = load_file(folder / _ADAPTER, device=str(device()))
    updates, rest = [], set(tensors)
    for key in sorted(tensors):
        stem, a, _ = key.partition(".lora_A.weight")
        other = f"{stem}.lora_B.weight"
        if a and other in tensors and tensors[key].ndim == tensors[other].ndim == 2:
            name = f"{stem.removeprefix('base_model.model.')}.weight"
            updates.append(
                Update(name, tensors[other], tensors[key], bool(config.get("fan_in_fan_out")))
            )
            rest -= {key, other}
    if rest or not updates:
        raise ModelError(
            f"{folder}: {f'holds {min(rest)!r}' if rest else 'is empty'}; SafeLoRA is for LoRA on "
            "linear layers alone (pairs of lora_A.weight and lora_B.weight)"
        )
    return tensors, updates, named_base(config)
