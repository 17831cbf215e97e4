"""The frozen linear layer: public function, registration, gradient.

Shape legend: K inputs, N outputs.

| argument | shape                                | dtype                               | grad |
|----------|--------------------------------------|-------------------------------------|------|
| x        | (..., K); (B, K, H, W) for a 1x1     | float32, bfloat16, float16, float64 | yes  |
|          | convolution                          |                                     |      |
| weight   | (N, K); (N, K, 1, 1)                 | that of x                           | no   |
| bias     | (N,) or None                         | that of x                           | no   |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops.frozen_linear import native, reference
from rewardprop_fast.ops.pointwise import as_matrix, as_pixels, as_rows, check_base, check_frozen
from rewardprop_fast.ops.registration import define, differentiable
from rewardprop_fast.ops.registry import Implementation, Operator, choose
from rewardprop_fast.ops.saved import check_like


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.zeros(2, 64, 320, dtype=dtype, device=device)
    return x, torch.zeros(320, 320, dtype=dtype, device=device), None


FROZEN_LINEAR = Operator(
    "frozen_linear",
    (
        Implementation("native", native.why_not, native.forward, native.backward),
        Implementation("reference", lambda *_: None, reference.forward, reference.backward),
    ),
    _example,
)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + b``, W and b frozen; nothing but a reference to W is kept for backward.

    PyTorch's linear layer does the same; its 1x1 convolution keeps x even if the weight is frozen.

    Args:
        x: (..., K), any strides; or (B, K, H, W) with a weight (N, K, 1, 1), channels_last memory
            is used as it lies.
        weight: (N, K), the dtype of x, no gradient.
        bias: (N,) or None, as ``weight``.

    Returns:
        (..., N), or (B, N, H, W) in the memory format of x. Gradients flow to x, once
        differentiable.

    Raises:
        ValueError: a shape, dtype or device does not fit, or weight or bias require a gradient.
    """
    check_frozen("frozen_linear", weight, bias)
    check_base(x, weight, bias)
    y = _FORWARD(as_rows(x, weight), as_matrix(weight), bias)
    return as_pixels(y, x, weight)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_base(x, weight, bias)
    x = x.contiguous()
    result: Tensor = choose(FROZEN_LINEAR, x, weight, bias).implementation.forward(x, weight, bias)
    return result


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_base(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward(grad: Tensor, weight: Tensor) -> Tensor:
    _check_gradient(grad, weight)
    grad = grad.contiguous()
    stand_in = grad.new_empty((0, weight.shape[1]))
    choice = choose(FROZEN_LINEAR, stand_in, weight, None)
    return choice.implementation.backward(grad, weight)


def _backward_fake(grad: Tensor, weight: Tensor) -> Tensor:
    _check_gradient(grad, weight)
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _save(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(args[1])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return _BACKWARD(grad, weight), None, None


_FORWARD = define(
    "frozen_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _forward, _forward_fake
)
_BACKWARD = define(
    "frozen_linear_backward(Tensor grad, Tensor weight) -> Tensor", _backward, _backward_fake
)
differentiable(_FORWARD, _save, _gradients)


def _check_gradient(grad: Tensor, weight: Tensor) -> None:
    check_like("grad", grad, (*grad.shape[:-1], weight.shape[0]), weight.dtype, weight.device)
