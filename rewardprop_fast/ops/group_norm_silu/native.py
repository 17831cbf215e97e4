"""Group normalisation in the compiled module (csrc/cpu/group_norm_silu_loops.cpp): CPU.

A pass for the statistics and one for the result, image by image, so that the second mostly reads
from the cache. Computed in float32, sums in float64; where the result is rounded to bfloat16, the
sigmoid is good to 2^-12 of its value. The result does not depend on the number of threads.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from rewardprop_fast.ops import native
from rewardprop_fast.ops.group_norm_silu import layout

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


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
        return f"x is {x.dtype}, it takes float32 and bfloat16"
    return native.why_not_cpu(x, weight, bias)


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
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    weight, bias = _single(weight), _single(bias)
    native.module().group_norm_silu(
        _shape(x, num_groups),
        x.data_ptr(),
        _address(weight),
        _address(bias),
        mean.data_ptr(),
        rstd.data_ptr(),
        y.data_ptr(),
        eps,
        silu,
        _DTYPES[x.dtype],
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
    grad_weight = grad_bias = None
    if needs[1]:
        grad_weight = x.new_empty(x.shape[1], dtype=torch.float32)
    if needs[2]:
        grad_bias = x.new_empty(x.shape[1], dtype=torch.float32)
    weight_single, bias_single = _single(weight), _single(bias)
    native.module().group_norm_silu_backward(
        _shape(x, mean.shape[1]),
        grad.data_ptr(),
        x.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        _address(weight_single),
        _address(bias_single),
        _address(grad_x),
        _address(grad_weight),
        _address(grad_bias),
        silu,
        _DTYPES[x.dtype],
    )
    found = [] if grad_x is None else [grad_x]
    for gradient, parameter in ((grad_weight, weight), (grad_bias, bias)):
        if gradient is not None and parameter is not None:
            found.append(gradient.to(parameter.dtype))
    return found


def _shape(x: Tensor, num_groups: int) -> tuple[int, int, int, int, bool]:
    """Images, channels, positions, groups, and the layout."""
    batch, channels, *spatial = x.shape
    return batch, channels, prod(spatial), num_groups, layout.is_channels_last(x)


def _single(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or parameter.dtype == torch.float32:
        return parameter
    return parameter.float()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
