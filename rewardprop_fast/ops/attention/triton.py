"""The Triton form of attention: where it is legal. Triton is imported when it is first used."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardprop_fast.ops import triton_runtime
from rewardprop_fast.ops.attention.reference import Needed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """None where this form is legal, otherwise the reason it is not."""
    if q.dtype not in _DTYPES:
        return f"q is {q.dtype}, it takes float32, bfloat16 and float16"
    return triton_runtime.why_not(q, k, v)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """O (B, H, Lq, D), laid out (B, Lq, H, D), and LSE (B, H, Lq)."""
    from rewardprop_fast.ops.attention import triton_launch

    return triton_launch.forward(q, k, v, scale)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needed: Needed,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as O is; those not needed have no elements."""
    from rewardprop_fast.ops.attention import triton_launch

    return triton_launch.backward(grad, q, k, v, out, lse, scale, needed)
