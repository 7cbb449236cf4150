"""Weights that are in pieces on all ranks (FSDP2, ZeRO-3): makes them whole for a moment, and
writes to them.

Does not know who sharded them, recipes, or what is trained.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor


def is_sharded(model: Any) -> bool:
    """Whether this model's weights are in pieces on all ranks (FSDP2, ZeRO-3). Then all ranks must
    run it equally often."""
    # The first alone: scanning all of them takes milliseconds.
    first = None if model is None else next(model.parameters(), None)
    return _is_fsdp(model) or (first is not None and _is_piece(first))


def _is_fsdp(model: Any) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def _is_piece(tensor: Tensor) -> bool:
    """Whether it is a parameter of ZeRO-3: empty, except while its module is computed."""
    return hasattr(tensor, "ds_id")


def gathered(parameters: Iterable[Tensor], written: bool = False) -> AbstractContextManager[Any]:
    """Makes ZeRO-3's parameters whole on every rank; every rank must enter. FSDP2 does not need it:
    its head stays whole.

    Args:
        parameters: none of them may already be gathered.
        written: keep what the main process writes to them.
    """
    pieces = [parameter for parameter in parameters if _is_piece(parameter)]
    if not pieces:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    gathering: AbstractContextManager[Any] = GatheredParameters(
        pieces, modifier_rank=0 if written else None
    )
    return gathering


def count(parameter: Tensor) -> int:
    """Number of a parameter's values, on all ranks together."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def load_whole_again() -> None:
    """Once ZeRO-3 has been set up, transformers would load every further model in pieces, which a
    single rank cannot do."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def note_trained(model: Any) -> None:
    """Before a model's first forward, FSDP2 notes what is trained, and in which type. The first one
    would be the reference's, with the adapter off: then gradients in bf16 would not fit weights in
    float32."""
    if _is_fsdp(model):
        model._get_fsdp_state()._lazy_init()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be in pieces; every rank must ask. A whole tensor is returned
    unchanged."""
    if _is_piece(tensor):
        with gathered([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write(tensor: Tensor, values: Tensor) -> None:
    """Writes whole values, which every rank has, into a tensor that may be in pieces."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        values = distribute_tensor(values.to(tensor.dtype), mesh, placements, src_data_rank=None)
    tensor.copy_(values)


def reshard(model: Any) -> None:
    """After forwards without a backward, sharded layers may still be whole; what is written to them
    then would be lost."""
    if _is_fsdp(model):
        for module in model.modules():
            if _is_fsdp(module):
                module.reshard()


def whole_state(model: Any, trained_only: bool, kept_here: bool) -> dict[str, Tensor]:
    """Weights of a sharded model by name, whole, in main memory, on the ranks that keep them
    (others get nothing); every rank must ask. A tied weight is listed under its first name only."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only
    )
    all_names = dict(model.named_parameters(remove_duplicate=False)).keys()
    tied = all_names - dict(model.named_parameters()).keys()
    if _is_fsdp(model):
        state: dict[str, Any] = get_model_state_dict(model, options=options)
    else:
        every = model.state_dict(keep_vars=True).items()
        kept = {name: t for name, t in every if t.requires_grad or not trained_only}
        each = ((name, whole(tensor)) for name, tensor in kept.items())
        state = {name: tensor.cpu() for name, tensor in each if kept_here}
    return {name: tensor for name, tensor in state.items() if name not in tied}
