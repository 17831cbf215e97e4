"""The frozen convolution in oneDNN, with weights that are brought into its layout only once.

Faster than PyTorch's own convolution by what that spends on its weights at each call: most at few
pixels and many channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rewardprop_fast.ops import onednn, packing
from rewardprop_fast.ops.frozen_conv2d import packed, reference

#: From here on the weight's share of the work is below a twentieth: a copy of it would not pay.
_MOST_POSITIONS = 8192


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
        return _linear(x, packed.linear_for_forward(weight), bias)
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
        return _linear(grad, packed.linear_for_input_gradient(weight), None)
    sizes = zip(weight.shape[2:], padding, dilation, strict=True)
    rest = [spread * (size - 1) - pad for size, pad, spread in sizes]
    if tuple(stride) != (1, 1) or min(rest) < 0:
        # No convolution over dY: oneDNN's own kernel for it, with the weight as it is.
        return reference.backward(
            grad, weight, x_shape, stride, padding, dilation, groups, channels_last
        )
    ready = packed.for_input_gradient(weight, rest, dilation, grad.shape)
    return onednn.convolution(grad, ready, None, [1, 1], rest, dilation)


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.permute(0, 2, 3, 1)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return y.permute(0, 3, 1, 2)


def _is_pointwise(weight: Tensor) -> bool:
    return tuple(weight.shape[2:]) == (1, 1)


def _is_plain_pointwise(weight: Tensor, padding: Sequence[int]) -> bool:
    return _is_pointwise(weight) and not any(padding)
