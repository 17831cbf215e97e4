"""Rows of an image, and 3x3 convolutions of some of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rewardprop_fast.ops.images import is_channels_last

#: Rows of a band. Each costs two to four rows more that only its neighbours' rows are made of: of
#: 64, 3 to 6 %.
ROWS = 64

_PAIR = [1, 1]


def bands(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """(first, end) of each band, from the top; the last may be lower."""
    for first in range(0, height, rows):
        yield first, min(first + rows, height)


def widened(first: int, end: int, height: int) -> tuple[int, int]:
    """With the row above and the row below, where there is one."""
    return max(first - 1, 0), min(end + 1, height)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A frozen 3x3 convolution with padding 1 of all rows of ``x``.

    Rows cut out of an image lack a neighbour: there the first and the last row of the result are
    not the image's, see `inner`.
    """
    y: Tensor = torch.ops.rewardprop_fast.frozen_conv2d(x, weight, bias, _PAIR, _PAIR, _PAIR, 1)
    return y


def convolution_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of that convolution's input, from rows of its output's."""
    batch, _, height, width = grad.shape
    shape = (batch, weight.shape[1], height, width)
    dx: Tensor = torch.ops.rewardprop_fast.frozen_conv2d_backward(
        grad, weight, shape, _PAIR, _PAIR, _PAIR, 1, is_channels_last(grad, weight)
    )
    return dx


def inner(image: Tensor, of: tuple[int, int], within: tuple[int, int]) -> Tensor:
    """The rows ``of`` from an image that has those of ``within``."""
    return image[:, :, of[0] - within[0] : of[1] - within[0]]
