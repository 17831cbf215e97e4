"""The guided DDIM step in Triton: one launch each way, over flat arrays.

The coefficients are read on the device, so a captured graph can be replayed with other values. On a
GPU the compiler may fuse a multiplication with an addition, which rounds once less than the
reference does.
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of kernels are Triton's own: pointers, numbers, compile-time constants.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewardprop_fast.ops.guided_ddim_step.compiled import empty_model_output
from rewardprop_fast.ops.triton_runtime import launch

_BLOCK = 1024


@triton.jit
def forward_kernel(
    model_output,
    latents,
    noise,
    coefficients,
    out,
    guidance_scale,
    count,
    GUIDED: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    a = tl.load(coefficients)
    b = tl.load(coefficients + 1)
    eps = tl.load(model_output + i, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        cond = tl.load(model_output + count + i, mask=inside, other=0.0).to(tl.float32)
        eps = eps + guidance_scale * (cond - eps)
    x_prev = a * tl.load(latents + i, mask=inside, other=0.0) + b * eps
    if NOISE:
        sigma = tl.load(coefficients + 2)
        x_prev = x_prev + sigma * tl.load(noise + i, mask=inside, other=0.0)
    tl.store(out + i, x_prev, mask=inside)


@triton.jit
def backward_kernel(
    grad,
    coefficients,
    out,
    uncond_share,
    cond_share,
    count,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    grad_eps = tl.load(coefficients + 1) * tl.load(grad + i, mask=inside, other=0.0)
    if GUIDED:
        uncond = uncond_share * grad_eps
        cond = cond_share * grad_eps
        tl.store(out + i, uncond.to(out.dtype.element_ty), mask=inside)
        tl.store(out + count + i, cond.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + i, grad_eps.to(out.dtype.element_ty), mask=inside)


def forward(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    noise: Tensor | None,
) -> Tensor:
    """x_prev (B, C, h, w), float32. All tensors dense and in one memory format."""
    out = torch.empty_like(latents)
    launch(
        forward_kernel,
        (triton.cdiv(out.numel(), _BLOCK),),
        {
            "model_output": model_output,
            "latents": latents,
            "noise": noise,
            "coefficients": coefficients,
            "out": out,
            "guidance_scale": 1.0 if guidance_scale is None else guidance_scale,
            "count": out.numel(),
        },
        {"GUIDED": guidance_scale is not None, "NOISE": noise is not None, "BLOCK": _BLOCK},
    )
    return out


def backward(
    grad: Tensor, coefficients: Tensor, guidance_scale: float | None, model_dtype: torch.dtype
) -> Tensor:
    """The gradient of model_output in ``model_dtype``, from the dense gradient of x_prev."""
    out = empty_model_output(grad, guidance_scale, model_dtype)
    scale = 1.0 if guidance_scale is None else guidance_scale
    launch(
        backward_kernel,
        (triton.cdiv(grad.numel(), _BLOCK),),
        {
            "grad": grad,
            "coefficients": coefficients,
            "out": out,
            "uncond_share": 1.0 - scale,
            "cond_share": scale,
            "count": grad.numel(),
        },
        {"GUIDED": guidance_scale is not None, "BLOCK": _BLOCK},
    )
    return out
