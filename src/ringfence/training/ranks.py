"""Training on several processes, called ranks: how they meet, wait for each other and leave.

accelerate is the engine: `accelerate launch` and `torchrun` set the number of ranks, and how the
model is sharded, in environment variables. Does not know recipes, defenses, or what is trained.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel

from ..errors import RingfenceError
from ..processes import is_main, world
from ..util.strict_json import check_shape, read_record

WAIT = timedelta(hours=1)  # the main process may measure a pilot while the others wait


def shards() -> bool:
    """Was this process started to train a model sharded over all ranks (FSDP2, ZeRO-3)?"""
    return fsdp() or deepspeed_stage() == 3


def fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1") and world() > 1


def deepspeed_stage() -> int | None:
    """ZeRO's stage, if DeepSpeed was requested."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":  # DeepSpeed's own, in place of accelerate's fields
        return _stage(Path(file))
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))


class _ZeRO(BaseModel):
    stage: int = 0


class _DeepSpeed(BaseModel):
    zero_optimization: _ZeRO = _ZeRO()


def _stage(file: Path) -> int:
    config = read_record(file, "mend it")
    check_shape(_DeepSpeed, config, str(file), "mend it")
    return _DeepSpeed(**config).zero_optimization.stage


def sharding() -> str | None:
    """What shards the weights, or their optimiser states, over the ranks."""
    stage = deepspeed_stage()
    return "FSDP2" if fsdp() else None if stage is None else f"DeepSpeed ZeRO-{stage}"


def device_settings() -> dict[str, Any]:
    """`cpu` and `backend` for accelerate. Told to stay on the CPU, it would ignore DeepSpeed's
    settings and train with DDP instead; without an accelerator it finds the CPU by itself."""
    on_cpu = not torch.accelerator.is_available()
    deepspeed = deepspeed_stage() is not None
    return {"cpu": on_cpu and not deepspeed, "backend": "gloo" if on_cpu and deepspeed else None}


def join() -> None:
    """Meets the other ranks; every rank gets its own device.

    Raises:
        RingfenceError: accelerate's config asks for a kind of sharding that is not supported.
    """
    if world() == 1:
        return
    if fsdp():
        _check_fsdp()
        # Defenses copy and check whole weights before sharding; else ranks above 0 have empty ones.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    from accelerate import PartialState

    if not dist.is_initialized():
        PartialState(**device_settings(), timeout=WAIT)


def _check_fsdp() -> None:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise RingfenceError(f"accelerate's config: fsdp_version: expected 2, found {version}")
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() in ("true", "1"):
        raise RingfenceError(
            "accelerate's config: fsdp_activation_checkpointing: set it to false, and "
            "train.gradient_checkpointing in the recipe to true"
        )


def shard_on_cpu(accelerator: Any) -> None:
    """accelerate would ignore FSDP's settings without an accelerator; torch shards on CPUs too."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if fsdp() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP


def autocast_in_deepspeed(accelerator: Any, bf16: bool) -> None:
    """DeepSpeed would cast the trained weights to bf16 too, and run the student without autocast,
    but not the reference; these settings leave weights as they are, and sum gradients in their own
    type."""
    from accelerate.utils import DistributedType

    if bf16 and accelerator.distributed_type == DistributedType.DEEPSPEED:
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        accelerator.deepspeed_plugin.deepspeed_config |= {
            "bf16": {"enabled": False},
            "torch_autocast": autocast,
        }


def leave() -> None:
    """Closes the group of ranks, so that the main process can continue alone."""
    if dist.is_initialized():
        from accelerate.state import AcceleratorState

        dist.barrier()
        dist.destroy_process_group()
        AcceleratorState._reset_state(True)


def wait() -> None:
    """Until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes first (it may fetch what all will read); all leave together."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()
    wait()


def largest(number: int, device: Any) -> int:
    """The largest of the ranks' numbers; every rank must ask."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
