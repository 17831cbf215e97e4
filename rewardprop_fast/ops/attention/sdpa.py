"""Attention by PyTorch's own fused kernels, through the aten operators that give LSE.

On a CPU: flash attention in C++. On a GPU: FlashAttention-2 for half precision and widths up to 192
(its backward pass for wider heads does not run on every consumer card), otherwise the
memory-efficient kernels, which know float32 and any width. Both compute all three gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardprop_fast.ops.attention.reference import Needed, token_major

_aten = torch.ops.aten

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLASH_WIDTH = 192
#: The memory-efficient kernels read LSE in vectors of this many queries.
_EFFICIENT_ROWS = 32


def why_not(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """None where this form is legal, otherwise the reason it is not."""
    if q.numel() == 0:
        return "there are no queries"
    if q.device.type == "cpu":
        return _wrong_dtype(q, _CPU_DTYPES)
    if q.device.type != "cuda":
        return f"it runs on the CPU and on CUDA devices, the tensors are on {q.device}"
    aligned = 4 if q.dtype == torch.float32 else 8
    if q.shape[-1] % aligned != 0:
        return f"on a GPU the width of a head must be a multiple of {aligned} in {q.dtype}"
    return _wrong_dtype(q, _GPU_DTYPES)


def _wrong_dtype(q: Tensor, allowed: tuple[torch.dtype, ...]) -> str | None:
    if q.dtype in allowed:
        return None
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    return f"q is {q.dtype}, on {q.device.type} it takes {names}"


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """O (B, H, Lq, D), laid out (B, Lq, H, D), and LSE (B, H, Lq)."""
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    elif _flash(q):
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    else:
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, scale=scale
        )
        lse = lse[..., : q.shape[2]]
    return _token_major(out), lse.contiguous()


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
    if q.device.type == "cpu":
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, scale=scale
        )
    elif _flash(q):
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is not
        found = _aten._scaled_dot_product_flash_attention_backward(
            *(grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2]),
            *(0.0, False, seed, seed[:0]),
            scale=scale,
        )
    else:
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        # Rows past the end weigh exp(S - inf) = 0.
        padded = F.pad(lse, (0, -lse.shape[-1] % _EFFICIENT_ROWS), value=float("inf"))
        found = _aten._scaled_dot_product_efficient_attention_backward(
            *(grad, q, k, v, None, out, padded, seed, seed, 0.0, [*needed, False]), scale=scale
        )[:3]
    dq, dk, dv = (
        _token_major(gradient) if need else q.new_empty(0)
        for gradient, need in zip(found, needed, strict=True)
    )
    return dq, dk, dv


def _flash(q: Tensor) -> bool:
    return q.dtype != torch.float32 and q.shape[-1] <= _FLASH_WIDTH


def _token_major(tensor: Tensor) -> Tensor:
    """The tensor itself where it lies as (B, L, H, D), as these kernels leave it; else a copy."""
    if tensor.transpose(1, 2).is_contiguous():
        return tensor
    return token_major(tensor).copy_(tensor)
