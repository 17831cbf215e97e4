"""The upsampling convolution as four small ones over the image before it is enlarged: CPU.

Of the 3x3 pixels that a result is computed from, upsampling has made several equal: rows
i - 1, i, i + 1 of the large image are two rows of the small one. Weights that meet the same pixel
are added up beforehand, which leaves a 2x2 convolution for each of the four phases (even or odd
row, even or odd column): 16 instead of 36 multiplications for a pixel of x, and no large image
(the sub-pixel convolution of arXiv 1609.07009, read backwards).

With the taps w0, w1, w2 of a row or column:

    even:  y[2i]     = w0 x[i - 1] + (w1 + w2) x[i]
    odd:   y[2i + 1] = (w0 + w1) x[i] + w2 x[i + 1]

The sums are rounded to the weight's dtype: a second rounding of about the size of the result's own.
Infinite pixels may give an infinity where PyTorch's own subtraction of infinities gives NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardprop_fast.ops import columns, onednn, packing

_NONE, _ONE, _PADDING = [0, 0], [1, 1], [1, 1]
_PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


def why_not(read: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None where this form is legal, otherwise why not.

    ``read`` is x in the forward pass, dY for the input gradient.
    """
    problem = onednn.why_not_image(read)
    if problem is not None:
        return problem
    if read.numel() == 0:
        return "there are 0 pixels"
    return packing.why_not(weight)


def why_no_gain(read: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None where this form is the fastest, otherwise why it is not."""
    return onednn.why_no_gain(weight)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (B, N, 2H, 2W), channels_last."""
    batch, _, height, width = x.shape
    y = torch.empty(
        (batch, weight.shape[0], 2 * height, 2 * width),
        dtype=x.dtype,
        memory_format=torch.channels_last,
    )
    for row, column in _PHASES:
        ready = _for_forward(weight, row, column, x.shape)
        part = onednn.convolution(x, ready, bias, _ONE, _PADDING, _ONE)
        # Padded on all sides, it is one larger than the phase: the odd ones begin one later.
        y[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
    return y


def backward(grad: Tensor, weight: Tensor) -> Tensor:
    """dX (B, C, H, W), channels_last, from dY (B, N, 2H, 2W)."""
    height, width = (size // 2 for size in grad.shape[2:])
    if columns.pays(grad[:, :, ::2, ::2], weight):
        images, channels = grad.shape[0], weight.shape[1]
        large = columns.input_gradient(
            grad, weight, (images, channels, 2 * height, 2 * width), _ONE, _ONE
        )
        packing.let_go(weight)
        pixels = large.permute(0, 2, 3, 1).reshape(images, height, 2, width, 2, channels)
        return pixels.sum((2, 4)).to(grad.dtype).permute(0, 3, 1, 2)
    total: Tensor | None = None
    for row, column in _PHASES:
        phase = grad[:, :, row::2, column::2].contiguous(memory_format=torch.channels_last)
        ready = _for_input_gradient(weight, row, column, phase.shape)
        part = onednn.transposed_convolution(phase, ready, _ONE, _NONE, _NONE, _ONE)
        own = part[:, :, 1 - row : 1 - row + height, 1 - column : 1 - column + width]
        total = own.float() if total is None else total.add_(own)
    assert total is not None
    return total.to(grad.dtype, memory_format=torch.channels_last)


def folded(weight: Tensor, row: int, column: int) -> Tensor:
    """(N, C, 2, 2), the weights of one phase."""
    rows = _fold(weight.detach().float(), row, 2)
    return _fold(rows, column, 3).to(weight.dtype)


def _fold(weight: Tensor, phase: int, dim: int) -> Tensor:
    first, middle, last = weight.unbind(dim)
    taps = (first + middle, last) if phase else (first, middle + last)
    return torch.stack(taps, dim)


def _for_forward(weight: Tensor, row: int, column: int, shape: Sequence[int]) -> Tensor:
    return packing.packs_of(weight).kept(
        ("upsampled forward", row, column),
        onednn.images_of_one_layout(weight, shape),
        lambda: onednn.pack_convolution(folded(weight, row, column), _ONE, _PADDING, _ONE, shape),
    )


def _for_input_gradient(weight: Tensor, row: int, column: int, shape: Sequence[int]) -> Tensor:
    return packing.packs_of(weight).kept(
        ("upsampled input gradient", row, column),
        tuple(shape),
        lambda: onednn.pack_transposed_convolution(
            folded(weight, row, column), _ONE, _NONE, _NONE, _ONE, shape
        ),
    )
