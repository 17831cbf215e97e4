"""Attention: public function, torch.library registration, gradient, legality.

Shape legend: B images, H heads, Lq queries, Lk keys, D width of a head.

| argument | shape          | dtype                               | grad |
|----------|----------------|-------------------------------------|------|
| q        | (B, H, Lq, D)  | float32, bfloat16, float16, float64 | yes  |
| k, v     | (B, H, Lk, D)  | that of q                           | yes  |

The registered operator also gives LSE (B, H, Lq), the logarithm of each query's sum of
exponentials: float32, for float64 inputs float64. It carries no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops.attention import native, reference, sdpa, triton, xformers
from rewardprop_fast.ops.registration import define, differentiable
from rewardprop_fast.ops.registry import Implementation, Operator, choose
from rewardprop_fast.ops.saved import check_like


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    q = torch.zeros(2, 64, 8, 40, dtype=dtype, device=device).transpose(1, 2)
    k = torch.zeros(2, 77, 8, 40, dtype=dtype, device=device).transpose(1, 2)
    return q, k, k.clone(), 40**-0.5


ATTENTION = Operator(
    "attention",
    (
        Implementation(
            "native", native.why_not, native.forward, native.backward, native.why_no_gain
        ),
        Implementation("triton", triton.why_not, triton.forward, triton.backward),
        Implementation("sdpa", sdpa.why_not, sdpa.forward, sdpa.backward),
        Implementation("xformers", xformers.why_not, xformers.forward, xformers.backward),
        Implementation("reference", lambda *_: None, reference.forward, reference.backward),
    ),
    _example,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_WIDTH = 512


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """``softmax(scale q kᵀ) v`` over all keys: no mask, no dropout.

    Scores and sums are in float32 (float64 for float64), whatever the inputs are. For backward it
    keeps q, k, v, the output and one float32 per query; the scores are computed again.

    Args:
        q: queries, (B, H, Lq, D), D from 1 to 512.
        k, v: keys and values, (B, H, Lk, D), Lk at least 1, with the dtype and device of q. All
            three may be views, such as (B, L, H, D) transposed or an expanded tensor; they are
            copied only where the elements of a head do not lie side by side.
        scale: of the scores; None is D^-1/2.

    Returns:
        O, (B, H, Lq, D) in the dtype of q. It lies in memory as (B, Lq, H, D), so that
        ``O.transpose(1, 2).reshape(B, Lq, H * D)`` is free; so do the gradients. Gradients flow to
        q, k and v, and are computed for those that need one; a second derivative is refused.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: arXiv 1706.03762, eq. 1; backward arXiv 2205.14135, appendix B.
    """
    _check(q, k, v)
    out: Tensor = _FORWARD.first(q, k, v, q.shape[-1] ** -0.5 if scale is None else float(scale))
    return out


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    _check(q, k, v)
    args = (_rows(q), _rows(k), _rows(v), scale)
    return choose(ATTENTION, *args).implementation.forward(*args)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    _check(q, k, v)
    lse = q.new_empty(q.shape[:-1], dtype=reference.compute_dtype(q.dtype))
    return reference.token_major(q), lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needed: reference.Needed,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v)
    _check_saved(grad, q, out, lse)
    grad, q, k, v, out = (_rows(tensor) for tensor in (grad, q, k, v, out))
    implementation = choose(ATTENTION, q, k, v, scale).implementation
    return implementation.backward(grad, q, k, v, out, lse.contiguous(), scale, needed)


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needed: reference.Needed,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v)
    _check_saved(grad, q, out, lse)
    return reference.gradients_like(q, k, v, needed)


def _save(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """q, k, v, O and LSE: nothing of the size Lq Lk."""
    q, k, v, ctx.scale = args
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)


def _gradients(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    gradients = _BACKWARD(grad, *ctx.saved_tensors, ctx.scale, needed)
    wanted = (gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
    return (*wanted, None)


_FORWARD = define(
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_BACKWARD = define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float scale, bool[3] needed) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
differentiable(_FORWARD, _save, _gradients)


# --- legality ---


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself where the elements of a head lie side by side, otherwise a copy."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (B, H, Lq, D).")
    batch, heads, _, width = q.shape
    if not 1 <= width <= _MAX_WIDTH:
        raise ValueError(f"q has heads of width {width}; allowed are 1 to {_MAX_WIDTH}.")
    if q.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"q has dtype {q.dtype}; allowed are {names}.")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != 4 or tensor.shape[:2] != q.shape[:2] or tensor.shape[3] != width:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with q {tuple(q.shape)} it must be "
                f"({batch}, {heads}, Lk, {width})."
            )
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, q has {q.dtype}; use one dtype.")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q is on {q.device}; use one device.")
    if k.shape != v.shape:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; they must be the same."
        )
    if k.shape[2] == 0:
        raise ValueError("k has no keys (Lk = 0); the softmax over none is not defined.")


def _check_saved(grad: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
    check_like("grad", grad, q.shape, q.dtype, q.device)
    check_like("out", out, q.shape, q.dtype, q.device)
    check_like("lse", lse, q.shape[:-1], reference.compute_dtype(q.dtype), q.device)
