"""The guided DDIM step in the compiled module (csrc/cpu/guided_ddim_loops.cpp): CPU, one pass.

It rounds as the reference does, operation by operation, so the two agree to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewardprop_fast.ops import native
from rewardprop_fast.ops.guided_ddim_step import compiled


def why_not(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    noise: Tensor | None,
) -> str | None:
    """None where this form is legal, otherwise the reason it is not. Any memory layout is legal."""
    if model_output.dtype not in (torch.float32, torch.bfloat16):
        return f"model_output is {model_output.dtype}, it takes float32 and bfloat16"
    for name, tensor in (("latents", latents), ("coefficients", coefficients)):
        if tensor.dtype != torch.float32:
            return f"{name} are {tensor.dtype}, it takes float32"
    return native.why_not_cpu(model_output, latents, coefficients, noise)


def forward(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    noise: Tensor | None,
) -> Tensor:
    """x_prev (B, C, h, w), float32. All tensors dense and in one memory format."""
    arguments = (model_output, latents, coefficients, guidance_scale, noise)
    return compiled.forward(native.module(), *arguments)


def backward(
    grad: Tensor, coefficients: Tensor, guidance_scale: float | None, model_dtype: torch.dtype
) -> Tensor:
    """The gradient of model_output in ``model_dtype``, from the dense gradient of x_prev."""
    arguments = (grad, coefficients, guidance_scale, model_dtype)
    return compiled.backward(native.module(), *arguments)
