"""The specification of `lora_linear`, in plain PyTorch.

    S   = x A^T                                   for all layers at once, A stacked
    y_i = x W_i^T + b_i + s_i S_i B_i^T           Hu et al. 2021, arXiv 2106.09685

    T_i = s_i dY_i B_i                            the gradient of S
    dX  = sum_i dY_i W_i + T A
    dA  = T^T x,  dB_i = s_i dY_i^T S_i           added up in float32 or better

Everything but dA and dB is computed in the dtype of x: it is what the network computes in. A and B
may be float32 master weights beside a bfloat16 network; their gradients have their own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardprop_fast.ops.lora_linear import adapters


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
) -> list[Tensor]:
    """The y_i (..., N_i), and last S (M, R) with M the product of x's leading sizes."""
    x_MK = x.reshape(-1, x.shape[-1])
    s_MR = x_MK @ lora_a.to(x.dtype).T
    outputs = []
    layers = zip(
        weights,
        biases,
        adapters.split(lora_b.to(x.dtype), weights, ranks),
        adapters.columns(ranks),
        scales,
        strict=True,
    )
    for w_NK, bias, b_NR, own, scale in layers:
        y_MN = F.linear(x_MK, w_NK, bias) + scale * (s_MR[:, own] @ b_NR.T)
        outputs.append(y_MN.view(*x.shape[:-1], w_NK.shape[0]))
    return [*outputs, s_MR]


def backward(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    x: Tensor | None,
    s_MR: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    x_shape: Sequence[int],
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX (x_shape), dA (R, K) and dB (flat), each None where ``needed`` says so.

    Args:
        grads: dY_i (..., N_i), or None for a y_i that was not used; at least one is given.
        x: needed for dA alone.
        s_MR: needed for dB alone.
    """
    dx_needed, da_needed, db_needed = needed
    dtype = next(grad.dtype for grad in grads if grad is not None)
    rows = math.prod(x_shape[:-1])
    t_MR = lora_a.new_zeros((rows, lora_a.shape[0]), dtype=dtype)
    dx_MK = lora_a.new_zeros((rows, lora_a.shape[1]), dtype=dtype) if dx_needed else None
    dbs = []
    layers = zip(
        grads,
        weights,
        adapters.split(lora_b.to(dtype), weights, ranks),
        adapters.columns(ranks),
        scales,
        strict=True,
    )
    for grad, w_NK, b_NR, own, scale in layers:
        if grad is None:
            dbs.append(lora_b.new_zeros(b_NR.numel()))
            continue
        dy_MN = grad.reshape(rows, w_NK.shape[0])
        t_MR[:, own] = scale * (dy_MN @ b_NR)
        if dx_MK is not None:
            dx_MK = dx_MK + dy_MN @ w_NK
        if db_needed:
            assert s_MR is not None
            db_NR = scale * summed_product(dy_MN, s_MR[:, own])
            dbs.append(db_NR.to(lora_b.dtype).reshape(-1))
    dx = da = None
    if dx_MK is not None:
        dx = (dx_MK + t_MR @ lora_a.to(dtype)).view(*x_shape)
    if da_needed:
        assert x is not None
        da = summed_product(t_MR, x.reshape(rows, lora_a.shape[1])).to(lora_a.dtype)
    return dx, da, torch.cat(dbs) if db_needed else None


def summed_product(p_MR: Tensor, q_MN: Tensor) -> Tensor:
    """p^T q over all rows, in float32 or better."""
    dtype = torch.promote_types(p_MR.dtype, torch.float32)
    return p_MR.to(dtype).T @ q_MN.to(dtype)
