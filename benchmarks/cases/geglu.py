"""Cases of `ops.geglu`: hidden * gelu(gate) of a packed input, as in diffusers."""

from __future__ import annotations

from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.networks import GegluLayer, Layer
from benchmarks.cases.protocol import Arguments, Case, Cost
from benchmarks.cases.shapes import normal
from rewardprop_fast import ops

OPERATOR = "geglu"


def of_layer(layer: Layer, count: int) -> list[Case]:
    return [case(layer, count)] if isinstance(layer, GegluLayer) else []


def checks() -> list[Case]:
    shapes = ((2, 64, 256), (1, 1, 2), (3, 7, 34), (65537, 6), (5, 2050))
    return [case(GegluLayer(shape)) for shape in shapes]


def case(layer: GegluLayer, count: int = 1) -> Case:
    name = "x".join(map(str, layer.shape))
    call = lambda **arguments: ops.geglu(**arguments)  # noqa: E731 looked up when it is called
    make, cost = partial(_make, layer), partial(_cost, layer)
    return Case(OPERATOR, name, make, call, ("x",), {"eager": eager}, cost, count)


def eager(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def _make(layer: GegluLayer, device: str, dtype: torch.dtype) -> Arguments:
    return {"x": normal(*layer.shape, device=device, dtype=dtype)}


def _cost(layer: GegluLayer, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """u is the output, half of the input. Floors 3u and 5u."""
    elements = prod(layer.shape) // 2
    u = elements * dtype.itemsize
    return Cost(12 * elements, 3 * u, u), Cost(24 * elements, 5 * u, u)
