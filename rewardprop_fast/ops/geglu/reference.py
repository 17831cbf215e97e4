"""The specification of GEGLU, in plain PyTorch.

    out = hidden gelu(gate), gelu(g) = g (1 + erf(g / sqrt(2))) / 2      GEGLU, arXiv 2002.05202

hidden and gate are the halves of the last dimension, as diffusers' GEGLU has them. Everything is
computed in float32, or float64 where x is, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu


def forward(x: Tensor) -> Tensor:
    """out (..., N) in the dtype of ``x`` (..., 2N)."""
    hidden, gate = x.to(compute_dtype(x.dtype)).chunk(2, dim=-1)
    return (hidden * gelu(gate)).to(x.dtype)


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x``, packed as it is, from ``grad`` (..., N), that of out."""
    dtype = compute_dtype(x.dtype)
    hidden, gate = x.to(dtype).chunk(2, dim=-1)
    grad = grad.to(dtype)
    grad_gate = torch.ops.aten.gelu_backward(grad * hidden, gate)
    return torch.cat([grad * gelu(gate), grad_gate], dim=-1).to(x.dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32: never less, whatever the network uses."""
    return torch.float64 if dtype == torch.float64 else torch.float32
