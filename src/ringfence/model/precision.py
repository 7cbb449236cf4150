"""The precision and the device with which models are computed here. Imports torch only to look at
the machine: recipes name precisions, and reading a report needs none."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "bf16", "fp32", "nf4"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]


def settled(precision: Precision) -> Precision:
    """What `auto` means on this machine: bf16 on an accelerator and on a CPU with instructions for
    it, else fp32. (A CPU without them multiplies in bf16 up to a hundred times slower than in
    float32.)"""
    if precision != "auto":
        return precision
    import torch

    fast = torch.accelerator.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"


def device() -> "torch.device":
    """The accelerator, or the CPU."""
    import torch

    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
