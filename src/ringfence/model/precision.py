"""In which precision and on which device a model is computed here."""

from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32", "nf4"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]


def settled(precision: Precision) -> Precision:
    """What `auto` means on this machine: bf16 on an accelerator and on a CPU that has instructions for it, else fp32.
    (A CPU without them computes a product in bf16 up to a hundred times slower than in float32.)"""
    if precision != "auto":
        return precision
    fast = torch.accelerator.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"


def device() -> torch.device:
    """The accelerator, or the CPU."""
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return accelerator or torch.device("cpu")
