"""What a backward operator is given: autograd gives what fits, who calls one himself might not."""

from __future__ import annotations

import torch
from torch import Tensor


def check_like(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuses a tensor of another shape, dtype or device."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; with the other "
            f"arguments it must be {tuple(shape)} {dtype} on {device}."
        )
