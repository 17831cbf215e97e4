"""A frozen convolution's weight as oneDNN reads it fastest, for each direction.

PyTorch's convolution on a CPU brings the weight into the layout that its kernel reads at every
call; for the small images of a UNet's inner levels that takes longer than the arithmetic. A frozen
weight can be brought there once: for the forward pass, and for the input gradient, which is the
transposed convolution with the same weight.

1x1 convolutions are packed as linear layers: oneDNN's packed layouts for those convolutions depend
on the image's size, and a convolution of another size then takes a hundred times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardprop_fast.ops import onednn
from rewardprop_fast.ops.packing import packs_of


def for_forward(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    shape: Sequence[int],
) -> Tensor:
    """The weight (N, C, kh, kw) as ``mkldnn::_convolution_pointwise`` reads it fastest.

    For images of this shape (B, C, H, W); mostly one copy is right for all.
    """
    return packs_of(weight).kept(
        ("forward", *stride, *padding, *dilation),
        onednn.images_of_one_layout(weight, shape),
        lambda: onednn.pack_convolution(weight.detach(), stride, padding, dilation, shape),
    )


def for_input_gradient(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    shape: Sequence[int],
) -> Tensor:
    """The weight as ``mkldnn::_convolution_transpose_pointwise`` reads it fastest.

    For gradients of this shape (B, N, H', W').
    """
    return packs_of(weight).kept_if_repeated(
        ("input gradient", *stride, *padding, *dilation),
        (*shape, *output_padding),
        lambda: onednn.pack_transposed_convolution(
            weight.detach(), stride, padding, output_padding, dilation, shape
        ),
    )


def linear_for_forward(weight: Tensor) -> Tensor:
    """A 1x1 weight as ``mkldnn::_linear_pointwise`` reads it fastest."""
    return packs_of(weight).kept(
        ("linear forward",),
        (),
        lambda: torch.ops.mkldnn._reorder_linear_weight(matrix(weight), None),
    )


def matrix(weight: Tensor) -> Tensor:
    """A 1x1 weight as (N, C), a view."""
    return weight.detach().reshape(weight.shape[:2])
