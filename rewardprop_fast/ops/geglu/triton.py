"""The Triton form of GEGLU: where it is legal. Triton itself is imported when it is first used."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardprop_fast.ops import triton_runtime


def why_not(x: Tensor) -> str | None:
    """None where this form is legal, otherwise the reason it is not. Any memory layout is legal."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}, it takes float32, bfloat16 and float16"
    return triton_runtime.why_not(x)


def forward(x: Tensor) -> Tensor:
    """out (..., N) from a contiguous ``x`` (..., 2N)."""
    from rewardprop_fast.ops.geglu import triton_kernels

    return triton_kernels.forward(x)


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x``, packed as it is; ``grad`` and ``x`` contiguous."""
    from rewardprop_fast.ops.geglu import triton_kernels

    return triton_kernels.backward(grad, x)
