"""Cases of `ops.guided_ddim_step`."""

from __future__ import annotations

from functools import partial
from math import prod

import torch
from torch import Tensor

from benchmarks.cases.networks import LatentsLayer, Layer
from benchmarks.cases.protocol import Arguments, Case, Cost
from benchmarks.cases.shapes import normal
from rewardprop_fast import ops

OPERATOR = "guided_ddim_step"


def of_layer(layer: Layer, count: int) -> list[Case]:
    return [case(layer, count)] if isinstance(layer, LatentsLayer) else []


def checks() -> list[Case]:
    return [
        case(LatentsLayer(shape), guided=guided, noisy=noisy)
        for shape in ((1, 4, 64, 64), (1, 1, 1, 1), (3, 4, 7, 5), (5, 16, 33, 129))
        for guided, noisy in ((True, False), (True, True), (False, False))
    ]


def case(layer: LatentsLayer, count: int = 1, guided: bool = True, noisy: bool = False) -> Case:
    name = "x".join(map(str, layer.shape))
    name += ("" if guided else " unguided") + (" noise" if noisy else "")
    return Case(
        OPERATOR,
        name,
        partial(_make, layer, guided, noisy),
        lambda **arguments: ops.guided_ddim_step(**arguments),
        ("model_output", "latents"),
        {"eager": eager},
        partial(_cost, layer, guided, noisy),
        count,
    )


def eager(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    noise: Tensor | None,
) -> Tensor:
    """The step as samplers write it: guidance in the network's dtype, then the update."""
    a, b, sigma = coefficients
    eps = model_output
    if guidance_scale is not None:
        uncond, cond = eps.chunk(2)
        eps = uncond + guidance_scale * (cond - uncond)
    x_prev = a * latents + b * eps.to(latents.dtype)
    return x_prev if noise is None else x_prev + sigma * noise


def _make(
    layer: LatentsLayer, guided: bool, noisy: bool, device: str, dtype: torch.dtype
) -> Arguments:
    batch, *rest = layer.shape
    latent_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    like = partial(normal, device=device, dtype=latent_dtype)
    coefficients = torch.tensor([1.02, -0.31, 0.17], dtype=latent_dtype, device=device)
    return {
        "model_output": normal((2 if guided else 1) * batch, *rest, device=device, dtype=dtype),
        "latents": like(*layer.shape),
        "coefficients": coefficients,
        "guidance_scale": 7.5 if guided else None,
        "noise": like(*layer.shape) if noisy else None,
    }


def _cost(layer: LatentsLayer, guided: bool, noisy: bool, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """u is the latents, float32. The gradient of the latents is a product of its own."""
    elements = prod(layer.shape)
    u = 4 * elements
    halves = (2 if guided else 1) * elements * dtype.itemsize
    forward = Cost(6 * elements, halves + (3 if noisy else 2) * u, u)
    return forward, Cost(4 * elements, u + halves, u)
