"""The Triton form of the guided DDIM step: where it is legal.

Triton itself is imported when it is first used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewardprop_fast.ops import triton_runtime


def why_not(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    noise: Tensor | None,
) -> str | None:
    """None where this form is legal, otherwise the reason it is not. Any memory layout is legal."""
    if model_output.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"model_output is {model_output.dtype}, it takes float32, bfloat16 and float16"
    for name, tensor in (("latents", latents), ("coefficients", coefficients)):
        if tensor.dtype != torch.float32:
            return f"{name} are {tensor.dtype}, it takes float32"
    return triton_runtime.why_not(model_output, latents, coefficients, noise)


def forward(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    noise: Tensor | None,
) -> Tensor:
    """x_prev (B, C, h, w), float32. All tensors dense and in one memory format."""
    from rewardprop_fast.ops.guided_ddim_step import triton_kernels

    return triton_kernels.forward(model_output, latents, coefficients, guidance_scale, noise)


def backward(
    grad: Tensor, coefficients: Tensor, guidance_scale: float | None, model_dtype: torch.dtype
) -> Tensor:
    """The gradient of model_output in ``model_dtype``, from the dense gradient of x_prev."""
    from rewardprop_fast.ops.guided_ddim_step import triton_kernels

    return triton_kernels.backward(grad, coefficients, guidance_scale, model_dtype)
