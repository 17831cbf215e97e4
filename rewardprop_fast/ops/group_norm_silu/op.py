"""Group normalisation with an optional SiLU: public function, registration, gradient, legality.

Shape legend: B images, C channels, G groups of C / G channels, spatial any number of dimensions.

| argument     | shape           | dtype                               | grad |
|--------------|-----------------|-------------------------------------|------|
| x            | (B, C, *spatial)| float32, bfloat16, float16, float64 | yes  |
| weight, bias | (C,) or None    | that of x, or float32               | yes  |
| mean, rstd   | (B, G)          | float32; float64 where x is         | no   |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops.group_norm_silu import cuda, layout, native, reference, triton
from rewardprop_fast.ops.registration import define, differentiable
from rewardprop_fast.ops.registry import Implementation, Operator, choose
from rewardprop_fast.ops.saved import check_like


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.zeros(2, 32, 8, 8, dtype=dtype, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.zeros(32, dtype=dtype, device=device) for _ in range(2))
    return x, weight, bias, 8, 1e-5, True


GROUP_NORM_SILU = Operator(
    "group_norm_silu",
    (
        Implementation("native", native.why_not, native.forward, native.backward),
        Implementation("cuda", cuda.why_not, cuda.forward, cuda.backward),
        Implementation("triton", triton.why_not, triton.forward, triton.backward),
        Implementation("reference", lambda *_: None, reference.forward, reference.backward),
    ),
    _example,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = False,
) -> Tensor:
    """Group normalisation (arXiv 1803.08494), and the SiLU after it in the same pass.

    ``y = act((x - mean) / sqrt(var + eps) * weight + bias)``, mean and variance over each of
    ``num_groups`` groups of neighbouring channels and all positions, ``act`` SiLU or nothing.

    Args:
        x: (B, C, *spatial); float32, bfloat16, float16 or float64. Channels first or channels last
            in memory, for any number of spatial dimensions; anything else is copied.
        num_groups: G, a divisor of C.
        weight: (C,) of x's dtype or float32, or None for 1.
        bias: likewise, or None for 0.
        eps: added to the variance.
        silu: apply z * sigmoid(z) to the result.

    Returns:
        y, like ``x`` in shape, dtype and memory layout. For the backward pass x itself and (B, G)
        means and reciprocal standard deviations are kept, nothing else; only those gradients are
        computed that are needed, so that frozen weights cost nothing. A second derivative is
        refused by autograd.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    result: Tensor = _FORWARD.first(x, weight, bias, num_groups, float(eps), bool(silu))
    return result


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias, num_groups, eps)
    channels_last = layout.is_channels_last(x)
    args = (
        layout.in_layout(x, channels_last),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        num_groups,
        eps,
        silu,
    )
    y, mean, rstd = choose(GROUP_NORM_SILU, *args).implementation.forward(*args)
    return layout.in_layout(y, channels_last), mean, rstd


def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias, num_groups, eps)
    mean, rstd = (
        x.new_empty((x.shape[0], num_groups), dtype=reference.compute_dtype(x.dtype))
        for _ in range(2)
    )
    return layout.empty_like(x), mean, rstd


def _backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]:
    _check_saved(grad, x, mean, rstd, weight, bias)
    channels_last = layout.is_channels_last(x)
    x = layout.in_layout(x, channels_last)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    # What is legal does not depend on eps, which the reciprocal deviations hold already.
    choice = choose(GROUP_NORM_SILU, x, weight, bias, mean.shape[1], 0.0, silu)
    gradients: list[Tensor] = choice.implementation.backward(
        layout.in_layout(grad, channels_last),
        x,
        mean.contiguous(),
        rstd.contiguous(),
        weight,
        bias,
        silu,
        tuple(needs),
    )
    if needs[0]:
        gradients[0] = layout.in_layout(gradients[0], channels_last)
    return gradients


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]:
    _check_saved(grad, x, mean, rstd, weight, bias)
    gradients = [layout.empty_like(x)] if needs[0] else []
    for parameter, needed in ((weight, needs[1]), (bias, needs[2])):
        if needed:
            assert parameter is not None
            gradients.append(parameter.new_empty(parameter.shape))
    return gradients


def _save(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """x, mean and rstd; weight and bias are the parameters themselves, no copies."""
    x, weight, bias, _, _, silu = args
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias)
    ctx.silu = silu


def _gradients(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    found = iter(_BACKWARD(grad, x, mean, rstd, weight, bias, ctx.silu, needs))
    return (*(next(found) if needed else None for needed in needs), None, None, None)


_FORWARD = define(
    "group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, int num_groups, float eps, "
    "bool silu) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_BACKWARD = define(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor? bias, bool silu, bool[3] needs) -> Tensor[]",
    _backward,
    _backward_fake,
)
differentiable(_FORWARD, _save, _gradients)


# --- legality ---


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> None:
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, C, *spatial).")
    if x.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"x has dtype {x.dtype}; allowed are {names}.")
    channels = x.shape[1]
    if num_groups < 1 or channels < 1 or channels % num_groups != 0:
        raise ValueError(
            f"num_groups is {num_groups}; it must divide the {channels} channels of x."
        )
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it must not be negative.")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if tuple(parameter.shape) != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; expected ({channels},), one number "
                "for each channel of x."
            )
        if parameter.dtype not in (x.dtype, torch.float32):
            raise ValueError(
                f"{name} has dtype {parameter.dtype}; allowed are that of x, {x.dtype}, and "
                "float32."
            )
        if parameter.device != x.device:
            raise ValueError(f"{name} is on {parameter.device}, x on {x.device}; use one device.")


def _check_saved(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    _check(x, weight, bias, mean.shape[1] if mean.dim() == 2 else 0, 0.0)
    check_like("grad", grad, x.shape, x.dtype, x.device)
    statistics = (x.shape[0], mean.shape[1])
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        check_like(name, tensor, statistics, reference.compute_dtype(x.dtype), x.device)
