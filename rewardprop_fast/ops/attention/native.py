"""Attention in the compiled module (csrc/cpu/attention_loops.cpp): CPU, a tile of scores at a time.

Softmax and sums are float32; products of bfloat16 are too, or, where the processor has AVX512-BF16,
its own of bfloat16 pairs. Sums have the same order on any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewardprop_fast.ops import native
from rewardprop_fast.ops.attention.reference import Needed, gradients_like, token_major

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
#: Measured on one thread with AVX512-BF16, before products ran on pairs: forward and backward of
#: PyTorch's kernel take 0.8 of the time here at width 512, 0.91 at 320, 0.98 at 256, but 1.03 and
#: more at 160 and below.
_MAX_BFLOAT16_WIDTH = 256


def why_not(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """None where this form is legal, otherwise the reason it is not."""
    if q.dtype not in _DTYPES:
        return f"q is {q.dtype}, it takes float32 and bfloat16"
    return native.why_not_cpu(q, k, v)


def why_no_gain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """None where this form is the fastest, otherwise the reason it is not."""
    if q.dtype == torch.bfloat16 and q.shape[-1] > _MAX_BFLOAT16_WIDTH:
        return f"for bfloat16 heads wider than {_MAX_BFLOAT16_WIDTH} PyTorch's kernel is faster"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """O (B, H, Lq, D), laid out (B, Lq, H, D), and LSE (B, H, Lq)."""
    out = token_major(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    native.module().attention(
        sizes=_sizes(q, k),
        dtype=_DTYPES[q.dtype],
        q=_lent(q),
        k=_lent(k),
        v=_lent(v),
        out=_lent(out),
        lse=lse.data_ptr(),
        scale=scale,
    )
    return out, lse


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
    grads = gradients_like(q, k, v, needed)
    dq, dk, dv = (_lent(g) if need else None for g, need in zip(grads, needed, strict=True))
    native.module().attention_backward(
        sizes=_sizes(q, k),
        dtype=_DTYPES[q.dtype],
        grad=_lent(grad),
        q=_lent(q),
        k=_lent(k),
        v=_lent(v),
        out=_lent(out),
        lse=lse.data_ptr(),
        dq=dq,
        dk=dk,
        dv=dv,
        scale=scale,
    )
    return grads


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    batch, heads, queries, width = q.shape
    return batch, heads, queries, k.shape[2], width


def _lent(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """The address and the strides of B, H and L."""
    return tensor.data_ptr(), tensor.stride()[:3]
