"""oneDNN's products and convolutions, by the names that PyTorch's own compiler calls them.

With AVX-512 float32 products run here, not in MKL, which PyTorch takes by itself: on an AMD EPYC,
beside other work, oneDNN took 0.78 to 0.9 of MKL's time for most shapes of diffusion models. With
AVX2 it takes 0.75 to 1.1 of it, but 1.3 to 1.8 for the input gradient of layers from 1280 columns
on, and of so many its sums are less than half as exact; on an Intel Xeon with AVX-512 it takes 0.9
to 1.1, and 1.0 to 1.6 for the input gradient. In bfloat16 PyTorch takes oneDNN already.
Weights of products are not packed beforehand: in bfloat16 the gain was within the noise, in float32
some shapes gained more, at the price of a second copy of the weight for each direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardprop_fast import processor

#: Below, a convolution's weight is so small that bringing it into another layout costs nothing.
_LEAST_CHANNELS = 16

#: oneDNN's widest block of output channels with AVX-512. Where it divides them, it is the block for
#: every image; elsewhere, and always on CPUs without AVX-512 or of bfloat16 in AMX's tiles, the
#: block depends on the image, and a weight packed for another takes up to thirty times as long,
#: since it is brought into the right layout at every call.
_BLOCK = 64


def linear(x_MK: Tensor, weight_NK: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of dense rows; the weight may be a transposed view."""
    if x_MK.dtype == torch.float32 and x_MK.shape[0] > 0 and _available() and _beats_mkl():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, bias, "none", [], "")
        return product
    return F.linear(x_MK, weight_NK, bias)


def convolution(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The convolution with a weight from `pack_convolution`; channels_last in and out."""
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, padding, stride, dilation, 1, "none", [], ""
    )
    return y


def images_of_one_layout(weight: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """What a packed copy of this weight is good for: () for images of every shape.

    Otherwise for those of this shape (B, C, H, W) alone.
    """
    one = weight.shape[0] % _BLOCK == 0 and _has_avx512()
    return () if one and not (weight.dtype == torch.bfloat16 and _has_amx()) else tuple(shape)


def pack_convolution(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    shape: Sequence[int],
) -> Tensor:
    """(N, C, kh, kw) in the layout that `convolution` reads fastest for an image of this shape."""
    image = images_of_one_layout(weight, shape)
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, 1, list(image) or None
    )
    return packed


def transposed_convolution(
    x: Tensor,
    packed: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """With a weight from `pack_transposed_convolution`; channels_last in and out."""
    y: Tensor = torch.ops.mkldnn._convolution_transpose_pointwise(
        x, packed, None, padding, output_padding, stride, dilation, 1, "none", [], ""
    )
    return y


def pack_transposed_convolution(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    shape: Sequence[int],
) -> Tensor:
    """(N, C, kh, kw) in the layout that `transposed_convolution` reads fastest for x of this shape.

    The weight is that of the convolution whose input gradient it is: nothing is flipped.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_transpose_weight(
        weight, padding, output_padding, stride, dilation, 1, list(shape)
    )
    return packed


def why_no_gain(weight: Tensor) -> str | None:
    """None where a packed copy of a convolution's weight pays, otherwise why not."""
    if min(weight.shape[:2]) < _LEAST_CHANNELS:
        return f"it pays from {_LEAST_CHANNELS} channels on both sides"
    return None


def why_not_image(read: Tensor) -> str | None:
    """None where a packed convolution can read this image, otherwise why not."""
    if read.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {read.device}"
    missing = why_not_convolution(read.dtype)
    if missing is not None:
        return missing
    if not read.is_contiguous(memory_format=torch.channels_last):
        return "x is not in channels_last memory"
    return None


@cache
def why_not_convolution(dtype: torch.dtype) -> str | None:
    """None where packed convolutions of this dtype can run, otherwise why not."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"x is {dtype}, it takes float32 and bfloat16"
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_nbytes")):
        return "this PyTorch has no oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this CPU"
    return None


@cache
def _has_avx512() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


@cache
def _has_amx() -> bool:
    return processor.bfloat16() == "amx"


@cache
def _beats_mkl() -> bool:
    return _has_avx512() and not processor.is_intel()


@cache
def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
