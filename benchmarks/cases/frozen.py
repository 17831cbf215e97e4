"""Cases of the operators with a frozen weight and nothing else: only x carries a gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.networks import ConvLayer, Layer, LinearLayer, UpsampleConvLayer
from benchmarks.cases.protocol import Arguments, Case, Cost
from benchmarks.cases.shapes import normal
from rewardprop_fast import ops


def of_layer(layer: Layer, count: int) -> list[Case]:
    if isinstance(layer, ConvLayer):
        return [conv(layer, count)]
    if isinstance(layer, UpsampleConvLayer):
        return [upsample_conv(layer, count)]
    if isinstance(layer, LinearLayer) and not layer.adapted:
        return [linear(layer, count)]
    return []


def checks() -> list[Case]:
    convs = (
        ((2, 8, 16, 16), 16, (3, 3), (1, 1), (1, 1)),
        ((1, 3, 7, 5), 5, (3, 3), (2, 2), (1, 1)),
        ((2, 7, 9, 11), 1, (1, 1), (1, 1), (0, 0)),
        ((1, 4, 8, 8), 6, (5, 3), (1, 2), (2, 0)),
    )
    linears = ((64, 32, 48, True), (1, 1, 1, False), (67, 33, 129, True))
    return [
        *(conv(ConvLayer(*sizes)) for sizes in convs),
        upsample_conv(UpsampleConvLayer((2, 16, 7, 5), 16)),
        *(linear(LinearLayer(*sizes, False)) for sizes in linears),
    ]


def conv(layer: ConvLayer, count: int = 1) -> Case:
    name = "x".join(map(str, layer.shape))
    name += f" to {layer.outputs}, {layer.kernel[0]}x{layer.kernel[1]}"
    name += f" stride {layer.stride[0]}" if layer.stride != (1, 1) else ""
    return Case(
        "frozen_conv2d",
        name,
        partial(_make_conv, layer),
        lambda **arguments: ops.frozen_conv2d(**arguments),
        ("x",),
        {"eager": _eager_conv},
        partial(_cost_conv, layer),
        count,
    )


def upsample_conv(layer: UpsampleConvLayer, count: int = 1) -> Case:
    return Case(
        "frozen_upsample_conv2d",
        f"{'x'.join(map(str, layer.shape))} to {layer.outputs}",
        partial(_make_upsample_conv, layer),
        lambda **arguments: ops.frozen_upsample_conv2d(**arguments),
        ("x",),
        {"eager": _eager_upsample_conv},
        partial(_cost_upsample_conv, layer),
        count,
    )


def linear(layer: LinearLayer, count: int = 1) -> Case:
    name = f"M{layer.tokens} K{layer.inputs} N{layer.outputs}"
    name += " bias" if layer.bias else ""
    return Case(
        "frozen_linear",
        name,
        partial(_make_linear, layer),
        lambda **arguments: ops.frozen_linear(**arguments),
        ("x",),
        {"eager": _eager_linear},
        partial(_cost_linear, layer),
        count,
    )


def _eager_conv(x: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> Tensor:
    return F.conv2d(x, weight, bias, **settings)


def _eager_upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def _eager_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _make_conv(layer: ConvLayer, device: str, dtype: torch.dtype) -> Arguments:
    inputs = layer.shape[1]
    like = partial(normal, device=device, dtype=dtype, channels_last=True)
    scale = (inputs * layer.kernel[0] * layer.kernel[1]) ** -0.5
    return {
        "x": like(*layer.shape),
        "weight": like(layer.outputs, inputs, *layer.kernel, scale=scale),
        "bias": like(layer.outputs),
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": (1, 1),
        "groups": 1,
    }


def _make_upsample_conv(layer: UpsampleConvLayer, device: str, dtype: torch.dtype) -> Arguments:
    inputs = layer.shape[1]
    like = partial(normal, device=device, dtype=dtype, channels_last=True)
    return {
        "x": like(*layer.shape),
        "weight": like(layer.outputs, inputs, 3, 3, scale=(9 * inputs) ** -0.5),
        "bias": like(layer.outputs),
    }


def _make_linear(layer: LinearLayer, device: str, dtype: torch.dtype) -> Arguments:
    like = partial(normal, device=device, dtype=dtype)
    return {
        "x": like(layer.tokens, layer.inputs),
        "weight": like(layer.outputs, layer.inputs, scale=layer.inputs**-0.5),
        "bias": like(layer.outputs) if layer.bias else None,
    }


def _cost_conv(layer: ConvLayer, dtype: torch.dtype) -> tuple[Cost, Cost]:
    batch, inputs, *spatial = layer.shape
    size = dtype.itemsize
    out = [
        (extent + 2 * padding - kernel) // stride + 1
        for extent, padding, kernel, stride in zip(
            spatial, layer.padding, layer.kernel, layer.stride, strict=True
        )
    ]
    pixels = batch * out[0] * out[1]
    taps = layer.kernel[0] * layer.kernel[1]
    x = batch * inputs * spatial[0] * spatial[1] * size
    y = pixels * layer.outputs * size
    weight = layer.outputs * inputs * taps * size
    flops = 2 * pixels * layer.outputs * inputs * taps
    cost = Cost(flops, x + y + weight, x)
    return cost, cost


def _cost_upsample_conv(layer: UpsampleConvLayer, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """As a convolution of the large image: what PyTorch computes."""
    batch, inputs, height, width = layer.shape
    size = dtype.itemsize
    x = batch * inputs * height * width * size
    y = 4 * batch * height * width * layer.outputs * size
    flops = 2 * 4 * batch * height * width * layer.outputs * inputs * 9
    cost = Cost(flops, x + y + layer.outputs * inputs * 9 * size, x)
    return cost, cost


def _cost_linear(layer: LinearLayer, dtype: torch.dtype) -> tuple[Cost, Cost]:
    size = dtype.itemsize
    x = layer.tokens * layer.inputs * size
    y = layer.tokens * layer.outputs * size
    weight = layer.inputs * layer.outputs * size
    flops = 2 * layer.tokens * layer.inputs * layer.outputs
    cost = Cost(flops, x + y + weight, x)
    return cost, cost
