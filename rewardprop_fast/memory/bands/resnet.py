"""A resnet whose backward pass goes over bands of rows.

    z1 = silu(norm1(x));  h = conv1(z1);  z2 = silu(norm2(h));  y = skip(x) + conv2(z2)

Backward, with one full image D of memory besides x, dy and the result, which D becomes:

1. For each band: h from x; dz2 = conv2^T(dy) into D, at its end if it is smaller; norm2's sums.
2. For each band: h from x once more; dh from h, D and the sums; dz1 = conv1^T(dh), in place of dz2,
   whose last row the next band still needs; norm1's sums.
3. For each band: dx = norm1's gradient of D, plus skip^T(dy), in place.

That is conv1 twice and each transposed convolution once, as many multiplications as recomputing
the block takes (conv1, conv2 and both transposed), and the rows that bands share.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rewardprop_fast.memory.bands.norm import BandedNorm
from rewardprop_fast.memory.bands.rows import (
    ROWS,
    bands,
    convolution,
    convolution_backward,
    inner,
    widened,
)
from rewardprop_fast.nn.layers import FastConv2d
from rewardprop_fast.nn.legality import has_hooks, is_plain

Statistics = tuple[Tensor, Tensor]


def banded_resnet(block: ResnetBlock2D, x: Tensor, rows: int = ROWS) -> Tensor:
    """The resnet's output, of which x and the norms' statistics are kept for backward.

    Forward it is the accelerated block's, to the last bit.

    Args:
        block: frozen, without a time embedding, as a VAE's decoder has them.
        x: (B, C, H, W).
        rows: of a band, at least 1.

    Returns:
        (B, N, H, W). Gradients flow to x, once differentiable.

    Raises:
        ValueError: the block or ``rows`` does not fit.
    """
    problem = why_not_resnet(block, x)
    if problem is not None:
        raise ValueError(f"This resnet cannot go back in bands: {problem}.")
    check_rows(rows)
    result: Tensor = _BandedResnet.apply(x, block, rows)
    return result


def why_not_resnet(block: nn.Module, x: Tensor) -> str | None:
    """None where `banded_resnet` can take a block's place, otherwise the reason."""
    if not isinstance(block, ResnetBlock2D):
        return f"it is {type(block).__name__}, not ResnetBlock2D"
    if block.time_emb_proj is not None:
        return "it has a time embedding"
    if block.upsample is not None or block.downsample is not None:
        return "it resizes"
    if type(block.nonlinearity) is not nn.SiLU:
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    if block.dropout.p > 0 and block.dropout.training:
        return "it drops out"
    parts = [block.norm1, block.norm2, block.conv1, block.conv2]
    parts += [] if block.conv_shortcut is None else [block.conv_shortcut]
    if has_hooks(*parts, block.nonlinearity, block.dropout):
        return "its parts have hooks"
    for conv in parts[2:4]:
        problem = why_not_3x3(conv)
        if problem is not None:
            return problem
    if block.conv_shortcut is not None and not is_plain_convolution(block.conv_shortcut, 1):
        return "its shortcut is no plain 1x1 convolution"
    return why_not_parameters(x, *parts)


def why_not_3x3(conv: nn.Module) -> str | None:
    return None if is_plain_convolution(conv, 3) else "a convolution is no plain 3x3"


def is_plain_convolution(conv: nn.Module, size: int) -> bool:
    """Of this size, over every pixel, with zeros around it; and no adapter in its place."""
    return (
        (type(conv) is nn.Conv2d or type(conv) is FastConv2d)
        and conv.kernel_size == (size, size)
        and conv.padding == (size // 2, size // 2)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def why_not_parameters(x: Tensor, *modules: nn.Module) -> str | None:
    """Everything frozen and in the dtype of x."""
    parameters = [p for module in modules for p in module.parameters()]
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        return "its weights are trained"
    return None if is_plain(x, *parameters) else "its weights and x differ in dtype"


def check_rows(rows: int) -> None:
    if rows < 1:
        raise ValueError(f"rows is {rows}; a band has at least 1.")


def normalised(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(norm(x)), and the means and reciprocal deviations."""
    operator = torch.ops.rewardprop_fast.group_norm_silu
    z, mean, rstd = operator(x, norm.weight, norm.bias, norm.num_groups, norm.eps, True)
    return z, mean, rstd


class _BandedResnet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Any, rows: int) -> Tensor:
        z, *first = normalised(block.norm1, x)
        h = convolution(z, block.conv1.weight, block.conv1.bias)
        del z
        z, *second = normalised(block.norm2, h)
        del h
        y = convolution(z, block.conv2.weight, block.conv2.bias)
        del z
        skip = x if block.conv_shortcut is None else _shortcut(block.conv_shortcut, x)
        output = skip + y
        ctx.save_for_backward(x, *first, *second)
        ctx.block, ctx.rows = block, rows
        factor = block.output_scale_factor
        return output if factor == 1 else output / factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, mean1, rstd1, mean2, rstd2 = ctx.saved_tensors
        factor = ctx.block.output_scale_factor
        if factor != 1:
            dy = dy / factor
        dx = _gradient(ctx.block, x, (mean1, rstd1), (mean2, rstd2), dy, ctx.rows)
        return dx, None, None


def _gradient(
    block: Any, x: Tensor, first: Statistics, second: Statistics, dy: Tensor, rows: int
) -> Tensor:
    height, width = x.shape[2:]
    norm1 = BandedNorm(block.norm1, *first, height * width)
    norm2 = BandedNorm(block.norm2, *second, height * width)
    conv1, conv2 = block.conv1, block.conv2

    def hidden(first: int, end: int) -> Tensor:
        """Rows of h."""
        seen = widened(first, end, height)
        z1 = norm1.activate(x[:, :, slice(*seen)])
        return inner(convolution(z1, conv1.weight, conv1.bias), (first, end), seen)

    dz1, dz2 = _together(x, conv1.out_channels)
    for band in bands(height, rows):
        seen = widened(*band, height)
        grad = inner(convolution_backward(dy[:, :, slice(*seen)], conv2.weight), band, seen)
        norm2.add_sums(hidden(*band), grad)
        dz2[:, :, slice(*band)] = grad

    above = dz2[:, :, :0]  # dz2's row above the band, where dz1 is already
    for band in bands(height, rows):
        seen = widened(*band, height)
        grad = torch.cat((above, dz2[:, :, band[0] : seen[1]]), dim=2)
        # Copied, for a part of it would keep all of it.
        above = grad[:, :, band[1] - 1 - seen[0] : band[1] - seen[0]].clone()
        dh = norm2.input_gradient(hidden(*seen), grad)
        grad = inner(convolution_backward(dh, conv1.weight), band, seen)
        norm1.add_sums(x[:, :, slice(*band)], grad)
        dz1[:, :, slice(*band)] = grad
    del dz2

    for band in bands(height, rows):
        own = (slice(None), slice(None), slice(*band))
        skip = dy[own]
        if block.conv_shortcut is not None:
            skip = _shortcut_backward(block.conv_shortcut, skip)
        dz1[own] = norm1.input_gradient(x[own], dz1[own], plus=skip)
    return dz1


def _together(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Memory for an image like ``x``, and for one of other channels: the same, if that can be.

    Where rows lie one after another, the second image may lie at the first one's end: written from
    the top, the first reaches a row of the second when that has been read.
    """
    batch, own, height, width = x.shape
    last = x.is_contiguous(memory_format=torch.channels_last)
    shape = (batch, channels, height, width)
    if channels > own or not last:
        layout = torch.channels_last if last else torch.contiguous_format
        other = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        return torch.empty_like(x), other
    image = torch.empty(
        shape[:1] + x.shape[1:], dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    flat = image.permute(0, 2, 3, 1).reshape(batch, -1)
    rows = flat[:, height * width * (own - channels) :].unflatten(1, (height, width, channels))
    return image, rows.permute(0, 3, 1, 2)


def _shortcut(conv: nn.Conv2d, x: Tensor) -> Tensor:
    y: Tensor = torch.ops.rewardprop_fast.frozen_conv2d(
        x, conv.weight, conv.bias, [1, 1], [0, 0], [1, 1], 1
    )
    return y


def _shortcut_backward(conv: nn.Conv2d, grad: Tensor) -> Tensor:
    shape = (grad.shape[0], conv.in_channels, *grad.shape[2:])
    last = not grad.is_contiguous()
    dx: Tensor = torch.ops.rewardprop_fast.frozen_conv2d_backward(
        grad, conv.weight, shape, [1, 1], [0, 0], [1, 1], 1, last
    )
    return dx
