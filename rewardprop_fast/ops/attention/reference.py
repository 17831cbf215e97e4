"""The specification of attention, in plain PyTorch.

    S = scale Q Kᵀ,  LSE = log Σ_k exp S,  P = exp(S - LSE),  O = P V

    dV = Pᵀ dO,  dP = dO Vᵀ,  δ = Σ_d dO O,  dS = P (dP - δ),  dQ = scale dS K,  dK = scale dSᵀ Q

Attention Is All You Need (arXiv 1706.03762, eq. 1); backward from O and LSE as in FlashAttention
(arXiv 2205.14135, appendix B.2): the scores are computed again, not kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Which of q, k and v need a gradient.
Needed = tuple[bool, bool, bool]


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """O (B, H, Lq, D) in the dtype of q, laid out (B, Lq, H, D), and LSE (B, H, Lq)."""
    dtype = compute_dtype(q.dtype)
    scores = (q.to(dtype) @ k.to(dtype).mT) * scale
    # softmax and logsumexp each subtract the row's maximum; the scale is in it already.
    out = token_major(q)
    out.copy_(torch.softmax(scores, -1) @ v.to(dtype))
    return out, torch.logsumexp(scores, -1)


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
    grad_q, grad_k, grad_v = gradients_like(q, k, v, needed)
    dtype = compute_dtype(q.dtype)
    q, k, v, grad, out = (tensor.to(dtype) for tensor in (q, k, v, grad, out))
    weights = torch.exp((q @ k.mT) * scale - lse[..., None])
    if needed[2]:
        grad_v.copy_(weights.mT @ grad)
    if needed[0] or needed[1]:
        delta = (grad * out).sum(-1, keepdim=True)
        grad_scores = weights * (grad @ v.mT - delta)
        if needed[0]:
            grad_q.copy_((grad_scores @ k) * scale)
        if needed[1]:
            grad_k.copy_((grad_scores.mT @ q) * scale)
    return grad_q, grad_k, grad_v


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_major(like: Tensor) -> Tensor:
    """New memory for (B, H, L, D) in the order (B, L, H, D).

    ``out.transpose(1, 2).reshape(B, L, H * D)``, which the output projection reads, is then a view.
    """
    batch, heads, length, width = like.shape
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


def gradients_like(
    q: Tensor, k: Tensor, v: Tensor, needed: Needed
) -> tuple[Tensor, Tensor, Tensor]:
    """New memory for the gradients, none for those that are not needed."""
    dq, dk, dv = (
        token_major(tensor) if wanted else tensor.new_empty(0)
        for tensor, wanted in zip((q, k, v), needed, strict=True)
    )
    return dq, dk, dv
