"""Calls of GEGLU in the compiled modules: _native and _cuda have the same functions.

``where`` is what _cuda asks for beside: the device and the stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def forward(module: Any, x: Tensor, **where: int) -> Tensor:
    """out (..., N) from a contiguous ``x`` (..., 2N)."""
    width = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width))
    module.geglu(
        x=x.data_ptr(),
        out=out.data_ptr(),
        rows=rows(out),
        width=width,
        dtype=_DTYPES[x.dtype],
        **where,
    )
    return out


def backward(module: Any, grad: Tensor, x: Tensor, **where: int) -> Tensor:
    """The gradient of ``x``, packed as it is; ``grad`` and ``x`` contiguous."""
    grad_x = torch.empty_like(x)
    module.geglu_backward(
        grad=grad.data_ptr(),
        x=x.data_ptr(),
        grad_x=grad_x.data_ptr(),
        rows=rows(grad),
        width=grad.shape[-1],
        dtype=_DTYPES[x.dtype],
        **where,
    )
    return grad_x


def rows(tensor: Tensor) -> int:
    """M: the leading dimensions together."""
    return tensor.numel() // tensor.shape[-1] if tensor.shape[-1] else 0
