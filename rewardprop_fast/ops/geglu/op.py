"""GEGLU: public function, torch.library registration, gradient, legality.

Shape legend: M rows (all leading dimensions together), N the width of hidden and of gate.

| argument | shape     | dtype                               | grad |
|----------|-----------|-------------------------------------|------|
| x        | (..., 2N) | float32, bfloat16, float16, float64 | yes  |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops.geglu import cuda, native, reference, triton
from rewardprop_fast.ops.registration import define, differentiable
from rewardprop_fast.ops.registry import Implementation, Operator, choose
from rewardprop_fast.ops.saved import check_like


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return (torch.zeros(2, 16, 64, dtype=dtype, device=device),)


GEGLU = Operator(
    "geglu",
    (
        Implementation("native", native.why_not, native.forward, native.backward),
        Implementation("cuda", cuda.why_not, cuda.forward, cuda.backward),
        Implementation("triton", triton.why_not, triton.forward, triton.backward),
        Implementation("reference", lambda *_: None, reference.forward, reference.backward),
    ),
    _example,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def geglu(x: Tensor) -> Tensor:
    """The gated activation ``hidden * gelu(gate)``, with the exact error function.

    GEGLU of arXiv 2002.05202 after its linear layer, as diffusers has it: hidden is the first and
    gate the second half of the last dimension.

    Args:
        x: packed hidden and gate, (..., 2N), float32, bfloat16, float16 or float64.

    Returns:
        (..., N), contiguous, in the dtype of ``x``; computed in float32 (float64 for float64) and
        rounded once. ``x`` alone is kept for the backward pass, whose gradient is packed as ``x``
        is; a second derivative is refused by autograd.

    Raises:
        ValueError: the last dimension is not even, or there is none, or the dtype is another one.
    """
    result: Tensor = _FORWARD(x)
    return result


def _forward(x: Tensor) -> Tensor:
    _check(x)
    x = x.contiguous()
    return choose(GEGLU, x).implementation.forward(x)


def _forward_fake(x: Tensor) -> Tensor:
    _check(x)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _backward(grad: Tensor, x: Tensor) -> Tensor:
    _check(x)
    _check_grad(grad, x)
    x = x.contiguous()
    return choose(GEGLU, x).implementation.backward(grad.contiguous(), x)


def _backward_fake(grad: Tensor, x: Tensor) -> Tensor:
    _check(x)
    _check_grad(grad, x)
    return x.new_empty(x.shape)


def _save(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    """The packed input and nothing else."""
    ctx.save_for_backward(*args)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return (_BACKWARD(grad, x),)


_FORWARD = define("geglu(Tensor x) -> Tensor", _forward, _forward_fake)
_BACKWARD = define("geglu_backward(Tensor grad, Tensor x) -> Tensor", _backward, _backward_fake)
differentiable(_FORWARD, _save, _gradients)


# --- legality ---


def _check(x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] % 2 != 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected (..., 2N), hidden and gate side by side."
        )
    if x.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"x has dtype {x.dtype}; allowed are {names}.")


def _check_grad(grad: Tensor, x: Tensor) -> None:
    check_like("grad", grad, (*x.shape[:-1], x.shape[-1] // 2), x.dtype, x.device)
