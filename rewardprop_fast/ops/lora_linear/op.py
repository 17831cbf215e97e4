"""Frozen linear layers with low-rank corrections: public functions, registration, gradient, checks.

Shape legend: M rows of x (its leading sizes multiplied), K inputs, N outputs, R rank.

| argument | shape                                | dtype                               | grad |
|----------|--------------------------------------|-------------------------------------|------|
| x        | (..., K); (B, K, H, W) for a 1x1     | float32, bfloat16, float16, float64 | yes  |
|          | convolution                          |                                     |      |
| weight   | (N, K); (N, K, 1, 1)                 | that of x                           | no   |
| bias     | (N,) or None                         | that of x                           | no   |
| lora_a   | (R, K); (R, K, 1, 1)                 | that of x, or float32               | yes  |
| lora_b   | (N, R); (N, R, 1, 1)                 | that of x, or float32               | yes  |

The operator itself, ``rewardprop_fast::lora_linear``, takes several layers on one x and the
adapters joined (`adapters`), and gives their outputs and S = x A^T, which backward needs. Its
``parts``, what was joined, all A and then all B, are kept for backward in place of the copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops.lora_linear import adapters, native, reference, triton
from rewardprop_fast.ops.pointwise import (
    as_matrix,
    as_pixels,
    as_rows,
    check_base,
    check_device,
    check_frozen,
)
from rewardprop_fast.ops.registration import define, differentiable
from rewardprop_fast.ops.registry import Implementation, Operator, choose
from rewardprop_fast.ops.saved import check_like


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.zeros(2, 64, 320, dtype=dtype, device=device)
    weight = torch.zeros(320, 320, dtype=dtype, device=device)
    lora_a = torch.zeros(16, 320, device=device)
    return x, [weight], [None], lora_a, torch.zeros(320 * 16, device=device), [16], [1.0]


LORA_LINEAR = Operator(
    "lora_linear",
    (
        Implementation("native", native.why_not, native.forward, native.backward),
        Implementation("triton", triton.why_not, triton.forward, triton.backward),
        Implementation("reference", lambda *_: None, reference.forward, reference.backward),
    ),
    _example,
)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """``y = x W^T + b + scale (x A^T) B^T``, W and b frozen (LoRA, arXiv 2106.09685).

    What is computed, is computed in the dtype of x; the gradients of A and B are added up in
    float32 and have the dtypes of A and B, which may be float32 master weights beside a bfloat16
    network. Kept for backward: x, if A needs a gradient, and the (M, R) product x A^T, if B does;
    neither is copied.

    Several adapters on one layer are one adapter with their A stacked and their B side by side; of
    differing scales, B_i times scale_i, with ``scale`` = 1.

    Args:
        x: (..., K), any strides. Or (B, K, H, W) with weights of a 1x1 convolution (N, K, 1, 1),
            (R, K, 1, 1), (N, R, 1, 1); channels_last memory is used as it lies.
        weight: (N, K), the dtype of x, no gradient.
        bias: (N,) or None, as ``weight``.
        lora_a: (R, K), the dtype of x or float32.
        lora_b: (N, R), likewise.
        scale: alpha / rank.

    Returns:
        (..., N); for a convolution (B, N, H, W), in the memory format of x. Gradients flow to x,
        lora_a and lora_b, once differentiable.

    Raises:
        ValueError: a shape, dtype or device does not fit, or weight or bias require a gradient.
    """
    return lora_linears(x, [weight], [bias], [lora_a], [lora_b], [scale])[0]


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, ...]:
    """`lora_linear` of several layers on one x, such as q, k and v: x is read and kept once.

    Args:
        x, weights, biases, lora_as, lora_bs, scales: as in `lora_linear`, one of each for every
            layer. Widths N and ranks may differ.

    Returns:
        The layers' outputs, in order.

    Raises:
        ValueError: as in `lora_linear`, or the numbers of layers differ.
    """
    *outputs, _ = FORWARD(*arguments(x, weights, biases, lora_as, lora_bs, scales))
    return tuple(as_pixels(output, x, weights[0]) for output in outputs)


def arguments(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Any, ...]:
    """What a person passes, checked, as the operator takes it. Raises ValueError."""
    _check_layers(x, weights, biases, lora_as, lora_bs, scales)
    parts = [as_matrix(lora) for lora in (*lora_as, *lora_bs)]
    lora_a, lora_b = adapters.join(parts)
    return (
        as_rows(x, weights[0]),
        [as_matrix(weight) for weight in weights],
        list(biases),
        lora_a,
        lora_b,
        [lora_b.shape[1] for lora_b in lora_bs],
        [float(scale) for scale in scales],
        None if len(weights) == 1 else parts,
    )


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    parts: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    _check(x, weights, biases, lora_a, lora_b, ranks, scales)
    args = (x, weights, biases, lora_a, lora_b.contiguous(), ranks, scales)
    return choose(LORA_LINEAR, *args).implementation.forward(*args)


def _forward_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    parts: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    _check(x, weights, biases, lora_a, lora_b, ranks, scales)
    outputs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    return [*outputs, x.new_empty((math.prod(x.shape[:-1]), lora_a.shape[0]))]


def _backward(
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
) -> list[Tensor]:
    _check_backward(grads, weights, x, s_MR, lora_a, lora_b, ranks, scales, x_shape)
    lora_b = lora_b.contiguous()
    # Legality is a matter of device, dtypes and the layers' sizes: no rows of x are needed.
    stand_in = weights[0].new_empty((0, x_shape[-1]))
    choice = choose(
        LORA_LINEAR, stand_in, weights, [None] * len(weights), lora_a, lora_b, ranks, scales
    )
    found = choice.implementation.backward(
        grads, weights, x, s_MR, lora_a, lora_b, ranks, scales, x_shape, needed
    )
    return [gradient for gradient in found if gradient is not None]


def _backward_fake(
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
) -> list[Tensor]:
    _check_backward(grads, weights, x, s_MR, lora_a, lora_b, ranks, scales, x_shape)
    dx_needed, da_needed, db_needed = needed
    found = []
    if dx_needed:
        found.append(next(g for g in grads if g is not None).new_empty(x_shape))
    if da_needed:
        found.append(lora_a.new_empty(lora_a.shape))
    if db_needed:
        found.append(lora_b.new_empty(lora_b.shape))
    return found


def save(ctx: Any, args: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    """x for the gradient of A, S for that of B; weights and adapters are the network's own.

    Joined adapters are copies: not they are kept, but what they were joined of.
    """
    x, weights, _, lora_a, lora_b, ranks, scales, *parts = args
    own = parts[0] if parts and parts[0] else (lora_a, lora_b)
    s_MR = output[-1]
    ctx.mark_non_differentiable(s_MR)
    ctx.save_for_backward(
        x if lora_a.requires_grad else None,
        s_MR if lora_b.requires_grad else None,
        *weights,
        *own,
    )
    ctx.x_shape = x.shape
    ctx.ranks, ctx.scales = ranks, scales


def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, s_MR, *weights_and_adapters = ctx.saved_tensors
    layers = len(ctx.ranks)
    weights = weights_and_adapters[:layers]
    lora_a, lora_b = adapters.join(weights_and_adapters[layers:])
    x_needed, _, _, a_needed, b_needed, *others = ctx.needs_input_grad
    needed = [x_needed, a_needed, b_needed]
    found = iter(
        _BACKWARD(
            list(grads[:-1]),
            weights,
            x,
            s_MR,
            lora_a,
            lora_b,
            ctx.ranks,
            ctx.scales,
            ctx.x_shape,
            needed,
        )
    )
    dx, da, db = (next(found) if wanted else None for wanted in needed)
    return dx, None, None, da, db, *(None for _ in others)


FORWARD = define(
    "lora_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor lora_a, Tensor lora_b, "
    "int[] ranks, float[] scales, Tensor[]? parts=None) -> Tensor[]",
    _forward,
    _forward_fake,
)
_BACKWARD = define(
    "lora_linear_backward(Tensor?[] grads, Tensor[] weights, Tensor? x, Tensor? s, Tensor lora_a, "
    "Tensor lora_b, int[] ranks, float[] scales, SymInt[] x_shape, bool[] needed) -> Tensor[]",
    _backward,
    _backward_fake,
)
differentiable(FORWARD, save, gradients)


# --- legality ---


def _check_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
) -> None:
    """What a person passes: each layer by itself."""
    counts = [len(part) for part in (weights, biases, lora_as, lora_bs, scales)]
    if len(set(counts)) != 1 or not weights:
        raise ValueError(
            "weights, biases, lora_as, lora_bs and scales have {}, {}, {}, {} and {} entries; "
            "expected one of each for every layer, and at least one layer.".format(*counts)
        )
    for layer in zip(weights, biases, lora_as, lora_bs, strict=True):
        _check_layer(x, *layer)


def _check_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor
) -> None:
    check_frozen("lora_linear", weight, bias)
    check_base(x, weight, bias)
    tail = tuple(weight.shape[2:])
    if lora_b.dim() != weight.dim() or lora_a.dim() != weight.dim():
        raise ValueError(
            f"lora_a has shape {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)}; they must "
            f"have as many dimensions as the weight {tuple(weight.shape)}."
        )
    rank = lora_b.shape[1]
    if rank < 1:
        raise ValueError(f"lora_b has shape {tuple(lora_b.shape)}; the rank must be at least 1.")
    for name, lora, expected, form in (
        ("lora_a", lora_a, (rank, weight.shape[1], *tail), "(R, K)"),
        ("lora_b", lora_b, (weight.shape[0], rank, *tail), "(N, R)"),
    ):
        if tuple(lora.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(lora.shape)}; with a weight {tuple(weight.shape)} and "
                f"rank {rank} it must be {form}: {expected}."
            )
        if lora.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
            raise ValueError(
                f"{name} has dtype {lora.dtype}; allowed are that of x, {x.dtype}, and float32 "
                "for master weights."
            )
        check_device(name, lora, x)


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
) -> None:
    """What the operator gets: the same, with the adapters joined."""
    counts = {len(part) for part in (weights, biases, ranks, scales)}
    if len(counts) != 1 or not weights:
        raise ValueError("expected one weight, bias, rank and scale for every layer.")
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dim() != 2:
            raise ValueError(f"a weight has shape {tuple(weight.shape)}; expected (N, K).")
        check_base(x, weight, bias)
    expected_a = (sum(ranks), x.shape[-1])
    expected_b = (sum(w.shape[0] * rank for w, rank in zip(weights, ranks, strict=True)),)
    for name, lora, expected in (("lora_a", lora_a, expected_a), ("lora_b", lora_b, expected_b)):
        if tuple(lora.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(lora.shape)}; expected {expected}.")
        check_device(name, lora, x)


def _check_backward(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    x: Tensor | None,
    s_MR: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    x_shape: Sequence[int],
) -> None:
    if not weights or len(grads) != len(weights):
        raise ValueError("expected one gradient or None for every layer, and at least one layer.")
    stand_in = weights[0].new_empty((0, x_shape[-1]))
    _check(stand_in, weights, [None] * len(weights), lora_a, lora_b, ranks, scales)
    dtype, device = weights[0].dtype, weights[0].device
    expected = [
        ("x", x, tuple(x_shape)),
        ("s", s_MR, (math.prod(x_shape[:-1]), lora_a.shape[0])),
    ]
    for grad, weight in zip(grads, weights, strict=True):
        expected.append(("a gradient", grad, (*x_shape[:-1], weight.shape[0])))
    for name, tensor, shape in expected:
        if tensor is not None:
            check_like(name, tensor, shape, dtype, device)
