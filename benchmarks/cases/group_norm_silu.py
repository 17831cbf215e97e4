"""Cases of `ops.group_norm`: GroupNorm with or without SiLU, frozen weights."""

from __future__ import annotations

from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.networks import GroupNormLayer, Layer
from benchmarks.cases.protocol import Arguments, Case, Cost
from benchmarks.cases.shapes import normal
from rewardprop_fast import ops

OPERATOR = "group_norm_silu"


def of_layer(layer: Layer, count: int) -> list[Case]:
    return [case(layer, count)] if isinstance(layer, GroupNormLayer) else []


def checks() -> list[Case]:
    """Odd sizes, size 1, both layouts, trained weights, tensors without a spatial extent."""
    found = []
    for shape, groups in (
        ((2, 64, 16, 16), 32),
        ((1, 6, 7, 5), 3),
        ((3, 10, 1, 1), 5),
        ((2, 20, 13, 11), 4),
        ((1, 320, 33, 31), 32),
        ((2, 34, 129), 2),
    ):
        for silu in (False, True):
            layer = GroupNormLayer(shape, groups, 1e-5, silu)
            found += [case(layer, channels_last=True), case(layer, channels_last=False)]
    trained = GroupNormLayer((2, 12, 9, 7), 4, 1e-5, True)
    return [*found, case(trained, leaves=("x", "weight", "bias"))]


def case(
    layer: GroupNormLayer,
    count: int = 1,
    channels_last: bool = True,
    leaves: tuple[str, ...] = ("x",),
) -> Case:
    channels_last = channels_last and len(layer.shape) == 4
    name = "x".join(map(str, layer.shape)) + (" NHWC" if channels_last else " NCHW")
    name += (" silu" if layer.silu else "") + (" trained" if len(leaves) > 1 else "")
    return Case(
        OPERATOR,
        name,
        partial(_make, layer, channels_last),
        lambda **arguments: ops.group_norm(**arguments),
        leaves,
        {"eager": eager},
        partial(_cost, layer),
        count,
    )


def eager(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if silu else y


def _make(layer: GroupNormLayer, channels_last: bool, device: str, dtype: torch.dtype) -> Arguments:
    channels = layer.shape[1]
    return {
        "x": normal(*layer.shape, device=device, dtype=dtype, channels_last=channels_last),
        "num_groups": layer.groups,
        "weight": normal(channels, device=device, dtype=dtype),
        "bias": normal(channels, device=device, dtype=dtype),
        "eps": layer.eps,
        "silu": layer.silu,
    }


def _cost(layer: GroupNormLayer, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Floors 2u and 3u: x and y; x, the output's gradient and that of x. No matmul."""
    u = prod(layer.shape) * dtype.itemsize
    small = 2 * layer.shape[1] * dtype.itemsize + 8 * layer.shape[0] * layer.groups
    elements = prod(layer.shape)
    return Cost(12 * elements, 2 * u + small, u), Cost(24 * elements, 3 * u + small, u)
