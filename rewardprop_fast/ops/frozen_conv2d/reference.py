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
    """dX (B, C, H, W), in memory as ``channels_last`` says, from dY (B, N, H', W').

    The transposed convolution of dY, which is what ``convolution_backward`` computes for dX, to the
    last bit. That would have to be given an x, of which it only looks at the sizes: memory for
    nothing, up to half a gigabyte in a decoder.
    """
    geometry = zip(
        x_shape[2:], grad.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
    )
    # The rows and columns of x beyond the last that any output has seen.
    unseen = [
        size - ((outputs - 1) * step - 2 * pad + spread * (taps - 1) + 1)
        for size, outputs, taps, step, pad, spread in geometry
    ]
    dx: Tensor = torch.ops.aten.convolution(
        grad, weight, None, stride, padding, dilation, True, unseen, groups
    )
    return dx
