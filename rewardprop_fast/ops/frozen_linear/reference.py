"""The specification of `frozen_linear`, in plain PyTorch: y = x W^T + b and dX = dY W."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (..., N)."""
    return F.linear(x, weight, bias)


def backward(grad: Tensor, weight: Tensor) -> Tensor:
    """dX (..., K)."""
    return grad @ weight
