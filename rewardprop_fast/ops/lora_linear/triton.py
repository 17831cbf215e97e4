"""The Triton form of `lora_linear`: where it is legal. Triton is imported when it is first used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardprop_fast.ops import triton_runtime

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
) -> str | None:
    """None where this form is legal, otherwise the reason it is not."""
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, it takes float32, bfloat16 and float16"
    return triton_runtime.why_not(x, *weights, *biases, lora_a, lora_b)


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
) -> list[Tensor]:
    """The y_i (..., N_i), and last S (M, R)."""
    from rewardprop_fast.ops.lora_linear import triton_launch

    return triton_launch.forward(x, weights, biases, lora_a, lora_b, ranks, scales)


def backward(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    x: Tensor | None,
    s_MR: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    x_shape: Sequence[int],
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA and dB as in the reference."""
    from rewardprop_fast.ops.lora_linear import triton_launch

    return triton_launch.backward(
        grads, weights, x, s_MR, lora_a, lora_b, ranks, scales, x_shape, needed
    )
