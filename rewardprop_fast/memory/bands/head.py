"""A decoder's end, whose backward pass goes over bands of rows.

    y = conv(silu(norm(x)))

Its convolution has three channels out and costs nothing to go through twice: for the norm's sums,
and for dx. The gradient between norm and convolution, as large as x, is never there as a whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rewardprop_fast.memory.bands.norm import BandedNorm
from rewardprop_fast.memory.bands.resnet import (
    check_rows,
    normalised,
    why_not_3x3,
    why_not_parameters,
)
from rewardprop_fast.memory.bands.rows import (
    ROWS,
    bands,
    convolution,
    convolution_backward,
    inner,
    widened,
)


def banded_head(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, rows: int = ROWS) -> Tensor:
    """``conv(silu(norm(x)))``, of which x and the norm's statistics are kept for backward.

    Args:
        norm, conv: frozen; the convolution is 3x3 with padding 1.
        x: (B, C, H, W).
        rows: of a band, at least 1.

    Returns:
        (B, N, H, W). Gradients flow to x, once differentiable.

    Raises:
        ValueError: a layer or ``rows`` does not fit.
    """
    problem = why_not_3x3(conv) or why_not_parameters(x, norm, conv)
    if problem is not None:
        raise ValueError(f"This norm and convolution cannot go back in bands: {problem}.")
    check_rows(rows)
    result: Tensor = _BandedHead.apply(x, norm, conv, rows)
    return result


class _BandedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, conv: Any, rows: int) -> Tensor:
        z, mean, rstd = normalised(norm, x)
        ctx.save_for_backward(x, mean, rstd)
        ctx.norm, ctx.conv, ctx.rows = norm, conv, rows
        return convolution(z, conv.weight, conv.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        x, mean, rstd = ctx.saved_tensors
        height, width = x.shape[2:]
        norm = BandedNorm(ctx.norm, mean, rstd, height * width)

        def activation_gradient(band: tuple[int, int]) -> Tensor:
            seen = widened(*band, height)
            rows = convolution_backward(dy[:, :, slice(*seen)], ctx.conv.weight)
            return inner(rows, band, seen)

        for band in bands(height, ctx.rows):
            norm.add_sums(x[:, :, slice(*band)], activation_gradient(band))
        dx = torch.empty_like(x)
        for band in bands(height, ctx.rows):
            own = x[:, :, slice(*band)]
            dx[:, :, slice(*band)] = norm.input_gradient(own, activation_gradient(band))
        return dx, None, None, None
