"""The multiply-adds of every operator, forward and backward, two FLOPs each, from shapes alone.

In the form of `torch.utils.flop_counter`, whose own table counts PyTorch's operations, so that
``FlopCounterMode(custom_mapping=FLOP_FORMULAS)`` counts an accelerated network too. As there, only
matrix products and convolutions count; the arithmetic of elements (a norm, a gate, a denoising
step) is hidden behind the bytes it moves and counts nothing.

Shape legend: M rows, K inputs, N outputs, R rank; B images, H heads, Lq queries, Lk keys, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, sdpa_flop_count

from rewardprop_fast.ops.attention import ATTENTION
from rewardprop_fast.ops.frozen_conv2d import FROZEN_CONV2D
from rewardprop_fast.ops.frozen_linear import FROZEN_LINEAR
from rewardprop_fast.ops.frozen_upsample_conv2d import FROZEN_UPSAMPLE_CONV2D
from rewardprop_fast.ops.geglu import GEGLU
from rewardprop_fast.ops.group_norm_silu import GROUP_NORM_SILU
from rewardprop_fast.ops.guided_ddim_step import GUIDED_DDIM_STEP
from rewardprop_fast.ops.lora_linear import LORA_LINEAR

Shape = Sequence[int]
Formula = Callable[..., int]


def _linear(x: Shape, weight: Shape, bias: Shape | None, *, out_shape: Any = None) -> int:
    return 2 * prod(x) * weight[0]


def _linear_backward(grad: Shape, weight: Shape, *, out_shape: Any = None) -> int:
    return 2 * prod(grad) * weight[1]


def _lora_linear(
    x: Shape,
    weights: Sequence[Shape],
    biases: Sequence[Shape | None],
    lora_a: Shape,
    lora_b: Shape,
    ranks: Sequence[int],
    scales: Sequence[float],
    parts: Sequence[Shape] | None = None,
    *,
    out_shape: Any = None,
) -> int:
    """x W^T of every layer, S = x A^T of all ranks together, S B^T of every layer."""
    rows = prod(x[:-1])
    outputs = sum(weight[0] for weight in weights)
    return 2 * rows * (x[-1] * (outputs + lora_a[0]) + lora_b[0])


def _lora_linear_backward(
    grads: Sequence[Shape | None],
    weights: Sequence[Shape],
    x: Shape | None,
    s: Shape | None,
    lora_a: Shape,
    lora_b: Shape,
    ranks: Sequence[int],
    scales: Sequence[float],
    x_shape: Shape,
    needed: Sequence[bool],
    *,
    out_shape: Any = None,
) -> int:
    """dS = dY B, where dx or dA is needed; dx = dY W + dS A; dA = dS^T x; dB = dY^T S.

    A layer whose output was not used has no dY and costs nothing.
    """
    dx_needed, da_needed, db_needed = needed
    rows, inputs = prod(x_shape[:-1]), x_shape[-1]
    flops = 0
    for grad, weight, rank in zip(grads, weights, ranks, strict=True):
        if grad is None:
            continue
        low_rank = 2 * rows * weight[0] * rank
        flops += low_rank * (bool(dx_needed or da_needed) + bool(db_needed))
        flops += 2 * rows * inputs * (weight[0] * dx_needed + rank * (dx_needed + da_needed))
    return flops


def _conv(
    x: Shape,
    weight: Shape,
    bias: Shape | None,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int,
    *,
    out_shape: Any = None,
) -> int:
    return int(conv_flop_count(list(x), list(weight), out_shape))


def _conv_backward(grad: Shape, weight: Shape, *geometry: Any, out_shape: Any = None) -> int:
    """The gradient of x: each multiply-add of the forward pass once more, from dY's side."""
    return int(conv_flop_count(list(grad), list(weight), out_shape, transposed=True))


def _upsample_conv(x: Shape, weight: Shape, bias: Shape | None, *, out_shape: Any = None) -> int:
    """The convolution of the large image, which PyTorch computes and a GPU does here.

    The CPU's form needs four ninths of it.
    """
    return int(conv_flop_count(list(x), list(weight), out_shape))


def _upsample_conv_backward(
    grad: Shape, weight: Shape, channels_last: bool, *, out_shape: Any = None
) -> int:
    return int(conv_flop_count(list(grad), list(weight), out_shape, transposed=True))


def _attention(q: Shape, k: Shape, v: Shape, scale: float, *, out_shape: Any = None) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward(
    grad: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    out: Shape,
    lse: Shape,
    scale: float,
    needed: Sequence[bool],
    *,
    out_shape: Any = None,
) -> int:
    """Five products if all is needed: the scores again, dO V^T for dq and dk, and one for each."""
    dq_needed, dk_needed, dv_needed = map(bool, needed)
    products = 1 + (dq_needed or dk_needed) + dq_needed + dk_needed + dv_needed
    return products * 2 * prod(q) * k[2]


def _elements(*shapes: Any, out_shape: Any = None) -> int:
    """No product of matrices: bytes are all that counts."""
    return 0


def _packets(name: str) -> tuple[Any, Any]:
    """The operator and its backward pass, as torch knows them."""
    library = torch.ops.rewardprop_fast
    return getattr(library, name), getattr(library, f"{name}_backward")


def _table(formulas: Mapping[str, tuple[Formula, Formula]]) -> dict[Any, Formula]:
    return {
        packet: formula
        for name, pair in formulas.items()
        for packet, formula in zip(_packets(name), pair, strict=True)
    }


#: Formulas by operator (an ``OpOverloadPacket``); tensors are given as their shapes.
FLOP_FORMULAS: Mapping[Any, Formula] = _table(
    {
        ATTENTION.name: (_attention, _attention_backward),
        FROZEN_CONV2D.name: (_conv, _conv_backward),
        FROZEN_LINEAR.name: (_linear, _linear_backward),
        FROZEN_UPSAMPLE_CONV2D.name: (_upsample_conv, _upsample_conv_backward),
        GEGLU.name: (_elements, _elements),
        GROUP_NORM_SILU.name: (_elements, _elements),
        GUIDED_DDIM_STEP.name: (_elements, _elements),
        LORA_LINEAR.name: (_lora_linear, _lora_linear_backward),
    }
)
