"""The frozen convolution in oneDNN, with weights that are brought into its layout only once.

Faster than PyTorch's own convolution by what that spends on its weights at each call: most at few
pixels and many channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rewardprop_fast.ops import columns, onednn, packing
from rewardprop_fast.ops.frozen_conv2d import packed

#: From here on the weight's share of the work is below a twentieth: a copy of it would not pay.
_MOST_POSITIONS = 8192

#: PyTorch multiplies matrices for a single image of no more numbers, where it takes oneDNN for all
#: others. In float32 these sums are up to 2.8 times as exact as oneDNN's.
_MOST_NUMBERS_OF_MATRICES = 20480


def why_not(
    read: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """None where this form is legal, otherwise why not.

    ``read`` is the image that is convolved: x in the forward pass, dY for the input gradient.
    """
    problem = onednn.why_not_image(read)
    if problem is not None:
        return problem
    if groups != 1:
        return f"there are {groups} groups, it takes one"
    if tuple(stride) != (1, 1) and _is_pointwise(weight):
        return "it is 1x1 with a stride"
    if read.numel() == 0:
        return "there are 0 pixels"
    if read.dtype == torch.float32 and read.shape[0] == 1:
        numbers = _fewest_numbers_of_x(read, weight, stride, padding, dilation)
        if numbers <= _MOST_NUMBERS_OF_MATRICES:
            return f"for one float32 image of {numbers} numbers PyTorch's sums are more exact"
    return packing.why_not(weight)


def why_no_gain(
    read: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """None where a packed copy of the weight is worth its memory, otherwise why not."""
    problem = onednn.why_no_gain(weight)
    if problem is not None:
        return problem
    positions = read.shape[0] * math.prod(read.shape[2:])
    if positions >= _MOST_POSITIONS:
        return f"it pays below {_MOST_POSITIONS} pixels, there are {positions}"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """y (B, N, H', W'), channels_last."""
    if _is_plain_pointwise(weight, padding):
        rows = x.permute(0, 2, 3, 1)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, packed.linear_for_forward(weight), bias, "none", [], ""
        )
        return y.permute(0, 3, 1, 2)
    ready = packed.for_forward(weight, stride, padding, dilation, x.shape)
    return onednn.convolution(x, ready, bias, stride, padding, dilation)


def backward(
    grad: Tensor,
    weight: Tensor,
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """dX (B, C, H, W), channels_last."""
    if _is_plain_pointwise(weight, padding):
        # Packing the transpose costs several times the product, and gains little.
        rows = grad.permute(0, 2, 3, 1)
        dx = onednn.linear(rows.reshape(-1, rows.shape[-1]), packed.matrix(weight).T, None)
        return dx.view(*rows.shape[:-1], weight.shape[1]).permute(0, 3, 1, 2)
    if columns.pays(grad, weight) and tuple(dilation) == (1, 1):
        dx_in_float32 = columns.input_gradient(grad, weight, x_shape, stride, padding)
        packing.let_go(weight)
        return dx_in_float32.to(grad.dtype).contiguous(memory_format=torch.channels_last)
    # The transposed convolution's output is as long as the shortest image that gives dY.
    lengths = zip(
        x_shape[2:], grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
    )
    missing = [
        size - ((count - 1) * step - 2 * pad + spread * (taps - 1) + 1)
        for size, count, step, pad, spread, taps in lengths
    ]
    ready = packed.for_input_gradient(weight, stride, padding, missing, dilation, grad.shape)
    return onednn.transposed_convolution(grad, ready, stride, padding, missing, dilation)


def _fewest_numbers_of_x(
    read: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> int:
    """Of x, where ``read`` is x, or where it is dY, whichever it may be."""
    outputs, inputs = weight.shape[:2]
    found = []
    if read.shape[1] == inputs:
        found.append(read.numel())
    if read.shape[1] == outputs:
        sizes = zip(read.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        found.append(
            inputs
            * math.prod(
                (count - 1) * step - 2 * pad + spread * (taps - 1) + 1
                for count, taps, step, pad, spread in sizes
            )
        )
    return min(found)


def _is_pointwise(weight: Tensor) -> bool:
    return tuple(weight.shape[2:]) == (1, 1)


def _is_plain_pointwise(weight: Tensor, padding: Sequence[int]) -> bool:
    return _is_pointwise(weight) and not any(padding)
