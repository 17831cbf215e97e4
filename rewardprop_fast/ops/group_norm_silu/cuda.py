"""Group normalisation in CUDA C++ (csrc/cuda/group_norm_*.cuh), in one of two forms.

*Whole*: a block keeps a group in shared memory, and everything is read once and written once.
*Sliced*: blocks share out positions and channels, and x (and the gradient) is read a second time,
3u and 5u where that comes from memory. Which one, and how many slices, is a fixed function of shape
and dtype (csrc/cuda/group_norm_silu.cu).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops import cuda_module
from rewardprop_fast.ops.group_norm_silu import layout

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def why_not(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> str | None:
    """None where this form is legal, otherwise the reason it is not."""
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, it takes float32, bfloat16 and float16"
    if x.shape[0] * x.shape[1] >= 2**31:
        return "images and channels together are 2^31 or more"
    return cuda_module.why_not(x, weight, bias)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the layout of ``x``, one of the two of layout.py; mean and rstd (B, G), float32."""
    y = layout.empty_like(x)
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return y, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    slice_P = _slice(x, num_groups, arrays=1)
    partial = _partial(x, slice_P)
    cuda_module.module().group_norm_silu(
        x=x.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        y=y.data_ptr(),
        partial=_address(partial),
        partial_count=0 if partial is None else partial.numel(),
        eps=eps,
        silu=silu,
        slice=slice_P,
        **_arguments(x, weight, bias, num_groups),
    )
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]:
    """The gradients that are needed, of x, weight and bias; ``grad`` in the layout of ``x``."""
    grad_x = layout.empty_like(x) if needs[0] else None
    grad_weight, grad_bias = (
        torch.empty_like(parameter) if needed and parameter is not None else None
        for parameter, needed in ((weight, needs[1]), (bias, needs[2]))
    )
    found = [gradient for gradient in (grad_x, grad_weight, grad_bias) if gradient is not None]
    if x.numel() == 0:
        return [gradient.zero_() for gradient in found]
    num_groups = mean.shape[1]
    slice_P = _slice(x, num_groups, arrays=2)
    partial = _partial(x, slice_P)
    room = {
        "sums": (2, *x.shape[:2]) if needs[1] or needs[2] else None,
        "group_means": (*mean.shape, 2) if slice_P else None,
    }
    scratch = {
        name: None if shape is None else x.new_empty(shape, dtype=torch.float32)
        for name, shape in room.items()
    }
    cuda_module.module().group_norm_silu_backward(
        grad=grad.data_ptr(),
        x=x.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        grad_x=_address(grad_x),
        grad_weight=_address(grad_weight),
        grad_bias=_address(grad_bias),
        partial=_address(partial),
        partial_count=0 if partial is None else partial.numel(),
        silu=silu,
        slice=slice_P,
        **{name: _address(tensor) for name, tensor in scratch.items()},
        **_arguments(x, weight, bias, num_groups),
    )
    return found


def _slice(x: Tensor, num_groups: int, arrays: int) -> int:
    """Positions of a slice; 0 where a block keeps whole groups of ``arrays`` tensors like ``x``."""
    slice_P: int = cuda_module.module().group_norm_silu_slice(
        **_sizes(x, num_groups), arrays=arrays
    )
    return slice_P


def _partial(x: Tensor, slice_P: int) -> Tensor | None:
    """Room for two numbers of each image, slice and channel, where there are slices."""
    if slice_P == 0:
        return None
    batch, channels, *spatial = x.shape
    return x.new_empty((batch, -(-prod(spatial) // slice_P), 2, channels), dtype=torch.float32)


def _arguments(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int
) -> dict[str, Any]:
    """What both passes are told."""
    return {
        "weight": _address(weight),
        "weight_dtype": _DTYPES[x.dtype if weight is None else weight.dtype],
        "bias": _address(bias),
        "bias_dtype": _DTYPES[x.dtype if bias is None else bias.dtype],
        **_sizes(x, num_groups),
        **cuda_module.where(x),
    }


def _sizes(x: Tensor, num_groups: int) -> dict[str, Any]:
    batch, channels, *spatial = x.shape
    return {
        "batch": batch,
        "channels": channels,
        "positions": prod(spatial),
        "groups": num_groups,
        "channels_last": layout.is_channels_last(x),
        "dtype": _DTYPES[x.dtype],
    }


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
