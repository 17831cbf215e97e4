"""`frozen_linear` on the CPU: PyTorch's products, in float32 with AVX-512 those of oneDNN."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardprop_fast.ops import onednn


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None where this form is legal, otherwise the reason it is not."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype}, it takes float32 and bfloat16"
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (..., N)."""
    y_MN = onednn.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y_MN.view(*x.shape[:-1], weight.shape[0])


def backward(grad: Tensor, weight: Tensor) -> Tensor:
    """dX (..., K)."""
    dx_MK = onednn.linear(grad.reshape(-1, grad.shape[-1]), weight.T, None)
    return dx_MK.view(*grad.shape[:-1], weight.shape[1])
