"""Random tensors in the memory layouts that the networks use."""

from __future__ import annotations

import torch
from torch import Tensor

MASTER = (torch.bfloat16, torch.float16)  # dtypes beside which a LoRA keeps float32 weights


def normal(
    *shape: int, device: str, dtype: torch.dtype, scale: float = 1.0, channels_last: bool = False
) -> Tensor:
    """Standard normal times ``scale``; drawn on the CPU, so every device gets the same values."""
    if device == "meta":
        tensor = torch.empty(shape, dtype=dtype, device=device)
    else:
        drawn = torch.randn(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        tensor = drawn.mul_(scale).to(dtype).to(device)
    if channels_last and len(shape) == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def itemsize(dtype: torch.dtype) -> int:
    return dtype.itemsize


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """A and B are float32 master weights where the network computes in 16 bits."""
    return torch.float32 if dtype in MASTER else dtype
