"""The specification of the upsampling convolution, in PyTorch's own operators.

    y  = conv2d(up(x), W, padding=1) + b, up(x)[i, j] = x[i // 2, j // 2]
    dX = the sums over 2x2 pixels of conv2d's input gradient

On a GPU this is the form that runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardprop_fast.ops.frozen_conv2d import reference as convolution
from rewardprop_fast.ops.images import is_channels_last, memory_format

_GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (B, N, 2H, 2W)."""
    large = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return convolution.forward(large, weight, bias, *_GEOMETRY)


def backward(grad: Tensor, weight: Tensor) -> Tensor:
    """dX (B, C, H, W) from dY (B, N, 2H, 2W), in its layout."""
    batch, _, height, width = grad.shape
    channels_last = is_channels_last(grad, weight)
    large = convolution.backward(
        grad, weight, (batch, weight.shape[1], height, width), *_GEOMETRY, channels_last
    )
    dx: Tensor = torch.ops.aten.upsample_nearest2d_backward(
        large.contiguous(memory_format=memory_format(channels_last)),
        [height, width],
        [batch, weight.shape[1], height // 2, width // 2],
        2.0,
        2.0,
    )
    return dx
