"""The input gradient of a convolution as one matrix product with the weight as it lies.

The product gives every tap's share of dX, and what falls on one place is added up in float32. The
weight is read once and not brought into another layout, which for few pixels takes several times as
long as the arithmetic: 1280 channels on both sides, a batch of two 8x8 images, bfloat16, on a Xeon
with AMX, 10 ms where packing takes 22 and the packed convolution 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rewardprop_fast.ops import onednn

#: The shares are to take no more than this part of the weight's memory: they are written and read.
_MOST_SHARE = 0.25


#: Smaller weights are packed in no time. Of few shares, too, each rounded to bfloat16 before it is
#: added, one may outweigh their sum; of many the error is 1.4 times that of the sum's own rounding.
_LEAST_BYTES = 2**20


def pays(image: Tensor, weight: Tensor) -> bool:
    """Whether an image has few pixels for so large a weight."""
    pixels = image.shape[0] * math.prod(image.shape[2:])
    return weight.nbytes >= _LEAST_BYTES and pixels <= _MOST_SHARE * weight.shape[0]


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """dX (B, C, H, W) in float32, channels_last, from dY (B, N, H', W'), channels_last.

    Of a convolution without dilation.
    """
    (batch, outputs, rows, columns), (_, inputs, *taps) = grad.shape, weight.shape
    dense = weight.is_contiguous()
    matrix = (weight if dense else weight.permute(0, 2, 3, 1)).reshape(outputs, -1)
    shares = onednn.linear(grad.permute(0, 2, 3, 1).reshape(-1, outputs), matrix.T, None)
    shares = shares.view(batch, rows, columns, *((inputs, *taps) if dense else (*taps, inputs)))
    height, width = (size + 2 * pad for size, pad in zip(x_shape[2:], padding, strict=True))
    total = grad.new_zeros((batch, height, width, inputs), dtype=torch.float32)
    for row in range(taps[0]):
        for column in range(taps[1]):
            down = _places(row, stride[0], rows)
            across = _places(column, stride[1], columns)
            own = shares[..., row, column] if dense else shares[..., row, column, :]
            total[:, down, across].add_(own)
    inner = total[:, padding[0] : height - padding[0], padding[1] : width - padding[1]]
    return inner.permute(0, 3, 1, 2)


def _places(first: int, step: int, count: int) -> slice:
    return slice(first, first + step * (count - 1) + 1, step)
