"""The Triton form of group normalisation: where it is legal. Triton is imported at first use."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardprop_fast.ops import triton_runtime

#: One program of the combining kernels holds the channels of a group.
MOST_GROUP_CHANNELS = 4096


def why_not(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> str | None:
    """None where this form is legal, otherwise the reason it is not."""
    problem = triton_runtime.why_not(x, weight, bias)
    if problem is not None:
        return problem
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}, it takes float32, bfloat16 and float16"
    if x.shape[1] // num_groups > MOST_GROUP_CHANNELS:
        return f"groups have more than {MOST_GROUP_CHANNELS} channels"
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the layout of ``x``, one of the two of layout.py; mean and rstd (B, G), float32."""
    from rewardprop_fast.ops.group_norm_silu import triton_launch

    return triton_launch.forward(x, weight, bias, num_groups, eps, silu)


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
    from rewardprop_fast.ops.group_norm_silu import triton_launch

    return triton_launch.backward(grad, x, mean, rstd, weight, bias, silu, needs)
