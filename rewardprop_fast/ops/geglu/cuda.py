"""GEGLU in CUDA C++ (csrc/cuda/geglu.cuh): every element is read and written once.

Computed in float32 with the arithmetic of the CPU's form, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewardprop_fast.ops import cuda_module
from rewardprop_fast.ops.geglu import compiled


def why_not(x: Tensor) -> str | None:
    """None where this form is legal, otherwise the reason it is not. Any memory layout is legal."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}, it takes float32, bfloat16 and float16"
    return cuda_module.why_not(x)


def forward(x: Tensor) -> Tensor:
    """out (..., N) from a contiguous ``x`` (..., 2N)."""
    return compiled.forward(cuda_module.module(), x, **cuda_module.where(x))


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x``, packed as it is; ``grad`` and ``x`` contiguous."""
    return compiled.backward(cuda_module.module(), grad, x, **cuda_module.where(x))
