"""`lora_linear` on the CPU: PyTorch's own matrix products, in the order that touches least memory.

The large products stay with oneDNN and MKL; what is saved are the passes between them. The
correction is added into the large product's output (one pass instead of three), nothing is copied
to float32 but blocks that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rewardprop_fast.ops import onednn
from rewardprop_fast.ops.lora_linear import adapters

#: Rows that are copied to float32 at a time: such a block of 1280 columns is 1.3 MB.
_BLOCK = 256


def why_not(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
) -> str | None:
    """None where this form is legal, otherwise the reason it is not."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype}, it takes float32 and bfloat16"
    return None


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
) -> list[Tensor]:
    """The y_i (..., N_i), and last S (M, R)."""
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
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
        y_MN = onednn.linear(x_MK, w_NK, bias)
        y_MN.addmm_(s_MR[:, own], b_NR.T, alpha=scale)
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
    """dX, dA and dB as in the reference."""
    dx_needed, da_needed, db_needed = needed
    dtype = next(grad.dtype for grad in grads if grad is not None)
    rows = math.prod(x_shape[:-1])
    a_RK = lora_a.to(dtype)
    dx_MK: Tensor | None = None
    db = lora_b.new_zeros(lora_b.shape, dtype=torch.float32) if db_needed else None
    ts: list[Tensor] = []
    a_rows: list[slice] = []
    layers = zip(
        grads,
        weights,
        adapters.split(lora_b.to(dtype), weights, ranks),
        [None] * len(ranks) if db is None else adapters.split(db, weights, ranks),
        adapters.columns(ranks),
        scales,
        strict=True,
    )
    for grad, w_NK, b_NR, db_NR, own, scale in layers:
        if grad is None:
            continue
        dy_MN = grad.reshape(rows, w_NK.shape[0])
        if dx_needed:
            part = onednn.linear(dy_MN.contiguous(), w_NK.T, None)
            dx_MK = part if dx_MK is None else dx_MK.add_(part)
        if db_NR is not None:
            assert s_MR is not None
            _add_summed_product(dy_MN, s_MR[:, own], scale, db_NR)
        ts.append(torch.mm(dy_MN, b_NR).mul_(scale))
        a_rows.append(own)
    if dx_MK is not None:
        for t_MR, own in zip(ts, a_rows, strict=True):
            dx_MK.addmm_(t_MR, a_RK[own])
    da = None
    if da_needed:
        assert x is not None
        da = lora_a.new_zeros(lora_a.shape, dtype=torch.float32)
        x_MK = x.reshape(rows, lora_a.shape[1])
        for t_MR, own in zip(ts, a_rows, strict=True):
            _add_summed_product(t_MR, x_MK, 1.0, da[own])
    return (
        None if dx_MK is None else dx_MK.view(*x_shape),
        None if da is None else da.to(lora_a.dtype),
        None if db is None else db.to(lora_b.dtype),
    )


def _add_summed_product(p_MR: Tensor, q_MN: Tensor, scale: float, out_RN: Tensor) -> None:
    """Adds scale p^T q to ``out_RN`` in float32, which oneDNN's bfloat16 product would round."""
    if p_MR.dtype == torch.float32:
        out_RN.addmm_(p_MR.T, q_MN, alpha=scale)
        return
    for p_block, q_block in zip(p_MR.split(_BLOCK), q_MN.split(_BLOCK), strict=True):
        out_RN.addmm_(p_block.float().T, q_block.float(), alpha=scale)
