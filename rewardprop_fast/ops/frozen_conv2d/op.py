"""The frozen convolution: public function, torch.library registration, gradient, checks.

Shape legend: B images, C channels in, N out, H and W, H' and W' the sizes of x and y, G groups.

| argument | shape            | dtype                               | grad |
|----------|------------------|-------------------------------------|------|
| x        | (B, C, H, W)     | float32, bfloat16, float16, float64 | yes  |
| weight   | (N, C/G, kh, kw) | that of x                           | no   |
| bias     | (N,) or None     | that of x                           | no   |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops.frozen_conv2d import native, reference
from rewardprop_fast.ops.images import is_channels_last, memory_format
from rewardprop_fast.ops.pointwise import check_alike, check_dtype, check_frozen
from rewardprop_fast.ops.registration import define, differentiable
from rewardprop_fast.ops.registry import Implementation, Operator, choose
from rewardprop_fast.ops.saved import check_like


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.zeros(2, 32, 8, 8, dtype=dtype, device=device)
    weight = torch.zeros(32, 32, 3, 3, dtype=dtype, device=device)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return x, weight, None, [1, 1], [1, 1], [1, 1], 1


FROZEN_CONV2D = Operator(
    "frozen_conv2d",
    (
        Implementation(
            "native", native.why_not, native.forward, native.backward, native.why_no_gain
        ),
        Implementation("reference", lambda *_: None, reference.forward, reference.backward),
    ),
    _example,
)

Pair = int | Sequence[int]


def frozen_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` with a frozen weight and bias.

    PyTorch's own keeps x for backward even if nothing needs it; this keeps a reference to the
    weight and nothing else, and backward computes the gradient of x alone. On a CPU, for images in
    channels_last memory, the weight is brought into oneDNN's layout once and not at every call: a
    copy that lies on the weight tensor, made when it is first used, and one for the gradient
    (`packing`; `packed_bytes` counts them, `drop_packs` frees them).

    Args:
        x: (B, C, H, W); float32, bfloat16, float16 or float64.
        weight: (N, C / groups, kh, kw), the dtype of x, no gradient.
        bias: (N,) or None, as ``weight``.
        stride, padding, dilation: a number, or one for each of H and W.
        groups: G, a divisor of C and N.

    Returns:
        y (B, N, H', W'), in channels_last memory if x or weight is, else contiguous; and so is the
        gradient. Gradients flow to x, once differentiable.

    Raises:
        ValueError: a shape, dtype or device does not fit, or weight or bias require a gradient.
    """
    check_frozen("frozen_conv2d", weight, bias)
    result: Tensor = _FORWARD(
        x,
        weight,
        bias,
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        groups,
    )
    return result


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    _check(x, weight, bias, stride, padding, dilation, groups)
    layout = memory_format(is_channels_last(x, weight))
    args = (
        x.contiguous(memory_format=layout),
        weight,
        bias,
        list(stride),
        list(padding),
        list(dilation),
        groups,
    )
    y: Tensor = choose(FROZEN_CONV2D, *args).implementation.forward(*args)
    return y.contiguous(memory_format=layout)


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    _check(x, weight, bias, stride, padding, dilation, groups)
    sizes = _output_size(x.shape, weight, stride, padding, dilation)
    shape = (x.shape[0], weight.shape[0], *sizes)
    layout = memory_format(is_channels_last(x, weight))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _backward(
    grad: Tensor,
    weight: Tensor,
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    _check_gradient(grad, weight, x_shape, stride, padding, dilation)
    layout = memory_format(channels_last)
    grad = grad.contiguous(memory_format=layout)
    geometry = (list(stride), list(padding), list(dilation), groups)
    # For the input gradient it is dY that is read.
    choice = choose(FROZEN_CONV2D, grad, weight, None, *geometry)
    dx: Tensor = choice.implementation.backward(grad, weight, x_shape, *geometry, channels_last)
    return dx.contiguous(memory_format=layout)


def _backward_fake(
    grad: Tensor,
    weight: Tensor,
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    _check_gradient(grad, weight, x_shape, stride, padding, dilation)
    layout = memory_format(channels_last)
    return torch.empty(x_shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


def _save(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    """The weight, which is the network's own, and the geometry; not x."""
    x, weight, _, *ctx.geometry = args
    ctx.save_for_backward(weight)
    ctx.x_shape = x.shape
    ctx.channels_last = is_channels_last(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    dx = _BACKWARD(grad, weight, ctx.x_shape, *ctx.geometry, ctx.channels_last)
    return dx, None, None, None, None, None, None


_FORWARD = define(
    "frozen_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups) -> Tensor",
    _forward,
    _forward_fake,
)
_BACKWARD = define(
    "frozen_conv2d_backward(Tensor grad, Tensor weight, SymInt[] x_shape, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, bool channels_last) -> Tensor",
    _backward,
    _backward_fake,
)
differentiable(_FORWARD, _save, _gradients)


# --- legality ---


def _pair(name: str, value: Pair) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) == 1:
        pair = pair * 2
    if len(pair) != 2 or not all(isinstance(number, int) for number in pair):
        raise ValueError(f"{name} is {value!r}; expected a whole number or two, for H and W.")
    return pair


def _output_size(
    x_shape: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """(H', W')."""
    geometry = zip(x_shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in geometry
    ]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    check_dtype(x)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (N, C / groups, kh, kw), no size 0."
        )
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0)):
        if min(values) < least:
            raise ValueError(f"{name} is {tuple(values)}; it must be at least {least}.")
    if min(dilation) < 1:
        raise ValueError(f"dilation is {tuple(dilation)}; it must be at least 1.")
    if groups < 1 or weight.shape[0] % groups != 0:
        raise ValueError(
            f"groups is {groups}; it must divide the {weight.shape[0]} output channels of weight."
        )
    channels = weight.shape[1] * groups
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; with a weight {tuple(weight.shape)} and groups "
            f"{groups} it must be (B, {channels}, H, W)."
        )
    if min(_output_size(x.shape, weight, stride, padding, dilation)) < 1:
        raise ValueError(
            f"x is {x.shape[2]} x {x.shape[3]}; with padding {tuple(padding)} that is smaller than "
            f"the reach of the weight {tuple(weight.shape)} at dilation {tuple(dilation)}."
        )
    check_alike(x, weight, bias)


def _check_gradient(
    grad: Tensor,
    weight: Tensor,
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    sizes = _output_size(x_shape, weight, stride, padding, dilation)
    check_like("grad", grad, (x_shape[0], weight.shape[0], *sizes), weight.dtype, weight.device)
