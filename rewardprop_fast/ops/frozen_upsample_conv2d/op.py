"""The upsampling convolution: public function, torch.library registration, gradient, checks.

Shape legend: B images, C channels in, N out, H and W the sizes of x.

| argument | shape         | dtype                               | grad |
|----------|---------------|-------------------------------------|------|
| x        | (B, C, H, W)  | float32, bfloat16, float16, float64 | yes  |
| weight   | (N, C, 3, 3)  | that of x                           | no   |
| bias     | (N,) or None  | that of x                           | no   |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops.frozen_upsample_conv2d import native, reference
from rewardprop_fast.ops.images import is_channels_last, memory_format
from rewardprop_fast.ops.pointwise import check_alike, check_dtype, check_frozen
from rewardprop_fast.ops.registration import define, differentiable
from rewardprop_fast.ops.registry import Implementation, Operator, choose
from rewardprop_fast.ops.saved import check_like


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.zeros(2, 32, 8, 8, dtype=dtype, device=device)
    weight = torch.zeros(32, 32, 3, 3, dtype=dtype, device=device)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return x, weight, None


FROZEN_UPSAMPLE_CONV2D = Operator(
    "frozen_upsample_conv2d",
    (
        Implementation(
            "native", native.why_not, native.forward, native.backward, native.why_no_gain
        ),
        Implementation("reference", lambda *_: None, reference.forward, reference.backward),
    ),
    _example,
)


def frozen_upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Nearest-neighbour upsampling by two, then a frozen 3x3 convolution with padding 1.

    What `torch.nn.functional.interpolate` and ``conv2d`` compute, as it ends the levels of a UNet
    and of a VAE's decoder. On a CPU, for images in channels_last memory, it is computed from x
    itself with weights that are added up and packed once (native.py): 16/9 of the weight's bytes
    for each direction, counted and freed as `frozen_conv2d`'s.

    Args:
        x: (B, C, H, W); float32, bfloat16, float16 or float64.
        weight: (N, C, 3, 3), the dtype of x, no gradient.
        bias: (N,) or None, as ``weight``.

    Returns:
        y (B, N, 2H, 2W), in channels_last memory if x or weight is, else contiguous; and so is the
        gradient. Gradients flow to x, once differentiable; for them the weight is kept and nothing
        else.

    Raises:
        ValueError: a shape, dtype or device does not fit, or weight or bias require a gradient.
    """
    check_frozen("frozen_upsample_conv2d", weight, bias)
    result: Tensor = _FORWARD(x, weight, bias)
    return result


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    layout = memory_format(is_channels_last(x, weight))
    args = (x.contiguous(memory_format=layout), weight, bias)
    y: Tensor = choose(FROZEN_UPSAMPLE_CONV2D, *args).implementation.forward(*args)
    return y.contiguous(memory_format=layout)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    batch, _, height, width = x.shape
    return torch.empty(
        (batch, weight.shape[0], 2 * height, 2 * width),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format(is_channels_last(x, weight)),
    )


def _backward(grad: Tensor, weight: Tensor, channels_last: bool) -> Tensor:
    _check_gradient(grad, weight)
    layout = memory_format(channels_last)
    grad = grad.contiguous(memory_format=layout)
    choice = choose(FROZEN_UPSAMPLE_CONV2D, grad, weight, None)
    dx: Tensor = choice.implementation.backward(grad, weight)
    return dx.contiguous(memory_format=layout)


def _backward_fake(grad: Tensor, weight: Tensor, channels_last: bool) -> Tensor:
    _check_gradient(grad, weight)
    batch, _, height, width = grad.shape
    return torch.empty(
        (batch, weight.shape[1], height // 2, width // 2),
        dtype=grad.dtype,
        device=grad.device,
        memory_format=memory_format(channels_last),
    )


def _save(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    """The weight, which is the network's own; not x, and no large image."""
    x, weight, _ = args
    ctx.save_for_backward(weight)
    ctx.channels_last = is_channels_last(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return _BACKWARD(grad, weight, ctx.channels_last), None, None


_FORWARD = define(
    "frozen_upsample_conv2d(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _forward,
    _forward_fake,
)
_BACKWARD = define(
    "frozen_upsample_conv2d_backward(Tensor grad, Tensor weight, bool channels_last) -> Tensor",
    _backward,
    _backward_fake,
)
differentiable(_FORWARD, _save, _gradients)


# --- legality ---


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_dtype(x)
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3) or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (N, C, 3, 3), no size 0."
        )
    if x.dim() != 4 or x.shape[1] != weight.shape[1] or 0 in x.shape[2:]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; with a weight {tuple(weight.shape)} it must be "
            f"(B, {weight.shape[1]}, H, W), H and W at least 1."
        )
    check_alike(x, weight, bias)


def _check_gradient(grad: Tensor, weight: Tensor) -> None:
    if grad.dim() != 4 or grad.shape[2] % 2 or grad.shape[3] % 2:
        raise ValueError(f"grad has shape {tuple(grad.shape)}; expected (B, N, 2H, 2W).")
    expected = (grad.shape[0], weight.shape[0], *grad.shape[2:])
    check_like("grad", grad, expected, weight.dtype, weight.device)
