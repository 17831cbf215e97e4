"""GEGLU in the compiled module (csrc/cpu/geglu_loops.cpp): CPU, one pass each way.

Computed in float32 with a polynomial for the normal distribution (csrc/math/normal.h), which in
the tails is nearer to the truth than 1 + erf, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewardprop_fast.ops import native
from rewardprop_fast.ops.geglu import compiled


def why_not(x: Tensor) -> str | None:
    """None where this form is legal, otherwise the reason it is not. Any memory layout is legal."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype}, it takes float32 and bfloat16"
    return native.why_not_cpu(x)


def forward(x: Tensor) -> Tensor:
    """out (..., N) from a contiguous ``x`` (..., 2N)."""
    return compiled.forward(native.module(), x)


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x``, packed as it is; ``grad`` and ``x`` contiguous."""
    return compiled.backward(native.module(), grad, x)
