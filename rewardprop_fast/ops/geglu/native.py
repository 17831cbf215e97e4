"""GEGLU in the compiled module (csrc/cpu/geglu_loops.cpp): CPU, one pass each way.

Computed in float32 with a polynomial for the normal distribution (csrc/math/normal.h), which in
the tails is nearer to the truth than 1 + erf, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewardprop_fast.ops import native

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def why_not(x: Tensor) -> str | None:
    """None where this form is legal, otherwise the reason it is not. Any memory layout is legal."""
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, it takes float32 and bfloat16"
    return native.why_not_cpu(x)


def forward(x: Tensor) -> Tensor:
    """out (..., N) from a contiguous ``x`` (..., 2N)."""
    width = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width))
    native.module().geglu(
        x=x.data_ptr(),
        out=out.data_ptr(),
        rows=_rows(out),
        width=width,
        dtype=_DTYPES[x.dtype],
    )
    return out


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x``, packed as it is; ``grad`` and ``x`` contiguous."""
    grad_x = torch.empty_like(x)
    native.module().geglu_backward(
        grad=grad.data_ptr(),
        x=x.data_ptr(),
        grad_x=grad_x.data_ptr(),
        rows=_rows(grad),
        width=grad.shape[-1],
        dtype=_DTYPES[x.dtype],
    )
    return grad_x


def _rows(tensor: Tensor) -> int:
    return tensor.numel() // tensor.shape[-1] if tensor.shape[-1] else 0
