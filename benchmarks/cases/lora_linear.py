"""Cases of `ops.lora_linear` and `ops.lora_linears`: frozen linear layers with a LoRA.

M tokens, K inputs, N outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.networks import Layer, LinearLayer, ProjectionsLayer
from benchmarks.cases.protocol import Arguments, Case, Cost
from benchmarks.cases.shapes import adapter_dtype, normal
from rewardprop_fast import ops

OPERATOR = "lora_linear"

RANK = 16
SCALE = 0.5
_GRADED = ("x", "lora_a", "lora_b")


def of_layer(layer: Layer, count: int) -> list[Case]:
    if isinstance(layer, LinearLayer) and layer.adapted:
        return [case(layer, RANK, count)]
    if isinstance(layer, ProjectionsLayer):
        return [several(layer, RANK, count)]
    return []


def checks() -> list[Case]:
    found = [
        case(LinearLayer(tokens, inputs, outputs, bias, True), rank)
        for tokens, inputs, outputs, bias, rank in (
            (128, 64, 64, True, 16),
            (1, 1, 1, False, 1),
            (77, 40, 96, True, 3),
            (131, 67, 129, False, 7),
            (257, 320, 320, True, 64),
            (65, 96, 1280, True, 256),
            (65537, 16, 24, False, 5),
        )
    ]
    return [
        *found,
        several(ProjectionsLayer(67, 48, 80), 4),
        several(ProjectionsLayer(128, 64, 64), 16),
    ]


def case(layer: LinearLayer, rank: int, count: int = 1) -> Case:
    name = f"M{layer.tokens} K{layer.inputs} N{layer.outputs} R{rank}"
    name += " bias" if layer.bias else ""
    return Case(
        OPERATOR,
        name,
        partial(_make, layer, rank),
        lambda **arguments: ops.lora_linear(**arguments),
        _GRADED,
        {"eager": eager, "peft": peft},
        partial(_cost, layer.tokens, layer.inputs, layer.outputs, rank, 1),
        count,
    )


def several(layer: ProjectionsLayer, rank: int, count: int = 1) -> Case:
    """q, k and v, whose arguments are numbered: weight_0, weight_1, weight_2."""
    return Case(
        OPERATOR,
        f"qkv M{layer.tokens} K{layer.inputs} N{layer.outputs} R{rank}",
        partial(_make_several, layer, rank),
        _call_several,
        ("x", *(f"lora_{side}_{index}" for index in range(3) for side in "ab")),
        {"eager": partial(_one_by_one, eager), "peft": partial(_one_by_one, peft)},
        partial(_cost, layer.tokens, layer.inputs, layer.outputs, rank, 3),
        count,
    )


def eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """In the dtype of x throughout, as autocast computes it."""
    low = F.linear(F.linear(x, lora_a.to(x.dtype)), lora_b.to(x.dtype))
    return F.linear(x, weight, bias) + scale * low


def peft(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """peft's own layer with these weights; it computes the adapter in the adapter's dtype."""
    layer = _peft_layer(weight.shape[1], weight.shape[0], bias is not None, lora_a.shape[0])
    base = layer.get_base_layer()
    base._parameters.update(weight=weight, bias=bias)
    layer.lora_A["default"]._parameters["weight"] = lora_a
    layer.lora_B["default"]._parameters["weight"] = lora_b
    layer.scaling["default"] = scale
    result: Tensor = layer(x)
    return result


@cache
def _peft_layer(inputs: int, outputs: int, bias: bool, rank: int) -> nn.Module:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = nn.Linear(inputs, outputs, bias, device="meta")
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False)
    layer: nn.Module = Linear(base, "default", config=config, r=rank, lora_alpha=rank)
    return layer


def _make(layer: LinearLayer, rank: int, device: str, dtype: torch.dtype) -> Arguments:
    like = partial(normal, device=device, dtype=dtype)
    masters = partial(normal, device=device, dtype=adapter_dtype(dtype))
    narrow = layer.inputs**-0.5  # so that outputs are of size 1, as in a network
    return {
        "x": like(layer.tokens, layer.inputs),
        "weight": like(layer.outputs, layer.inputs, scale=narrow),
        "bias": like(layer.outputs) if layer.bias else None,
        "lora_a": masters(rank, layer.inputs, scale=narrow),
        "lora_b": masters(layer.outputs, rank, scale=rank**-0.5),
        "scale": SCALE,
    }


def _make_several(layer: ProjectionsLayer, rank: int, device: str, dtype: torch.dtype) -> Arguments:
    one = LinearLayer(layer.tokens, layer.inputs, layer.outputs, False, True)
    made = [_make(one, rank, device, dtype) for _ in range(3)]
    numbered = {
        f"{name}_{index}": arguments[name]
        for index, arguments in enumerate(made)
        for name in ("weight", "lora_a", "lora_b")
    }
    return {"x": made[0]["x"], **numbered}


def _call_several(x: Tensor, **numbered: Tensor) -> tuple[Tensor, ...]:
    weights, lora_as, lora_bs = (
        [numbered[f"{name}_{index}"] for index in range(3)]
        for name in ("weight", "lora_a", "lora_b")
    )
    outputs: tuple[Tensor, ...] = tuple(
        ops.lora_linears(x, weights, [None] * 3, lora_as, lora_bs, [SCALE] * 3)
    )
    return outputs


def _one_by_one(single: Callable[..., Tensor], x: Tensor, **numbered: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        single(
            x,
            numbered[f"weight_{index}"],
            None,
            numbered[f"lora_a_{index}"],
            numbered[f"lora_b_{index}"],
            SCALE,
        )
        for index in range(3)
    )


def _cost(
    tokens: int, inputs: int, outputs: int, rank: int, heads: int, dtype: torch.dtype
) -> tuple[Cost, Cost]:
    """Forward: x, every y, S and the weights. Backward: x, every dy, S, dx and the weights.

    ``heads`` linear layers share one x. u is one x or y, whichever is meant: their mean.
    """
    size, master = dtype.itemsize, adapter_dtype(dtype).itemsize
    x, y = tokens * inputs * size, heads * tokens * outputs * size
    kept = heads * tokens * rank * size
    weights = heads * outputs * inputs * size
    adapters = heads * rank * (inputs + outputs) * master
    main = 2 * heads * tokens * inputs * outputs
    low = 2 * heads * tokens * rank * (inputs + outputs)
    unit = (x + y) / (1 + heads)
    forward = Cost(main + low, x + y + kept + weights + adapters, unit)
    # dS and dB from dy, dx and dA from dS, and the main product.
    backward = Cost(main + 2 * low, 2 * x + y + kept + weights + 2 * adapters, unit)
    return forward, backward
