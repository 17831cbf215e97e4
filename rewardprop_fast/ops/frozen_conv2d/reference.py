"""The specification of the frozen convolution, in PyTorch's own operators.

    y  = conv2d(x, W) + b
    dX = conv2d(dY, W) transposed: the input gradient alone, neither dW nor db

On a GPU this is cuDNN through aten, and the form that runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """y (B, N, H', W')."""
    return torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, False, [0, 0], groups
    )


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
    """dX (B, C, H, W), in memory as ``channels_last`` says, from dY (B, N, H', W')."""
    # Of x, aten reads no value: the gradient of W, which would need them, is switched off.
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(x_shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    dx: Tensor = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [True, False, False],
    )[0]
    return dx
