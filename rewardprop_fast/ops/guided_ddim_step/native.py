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
    if latents.dtype != torch.float32:
        return f"latents are {latents.dtype}, it takes float32"
    if coefficients.dtype != torch.float32:
        return f"coefficients are {coefficients.dtype}, it takes float32"
    return native.why_not_cpu(model_output, latents, coefficients, noise)


def forward(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    noise: Tensor | None,
) -> Tensor:
    """x_prev (B, C, h, w), float32. All tensors dense and in one memory format."""
    out = torch.empty_like(latents)
    # By position: at the usual sizes of latents naming them would be a tenth of the time.
    native.module().guided_ddim_step(
        model_output.data_ptr(),
        model_output.numel(),
        compiled.MODEL_DTYPES[model_output.dtype],
        latents.data_ptr(),
        None if noise is None else noise.data_ptr(),
        coefficients.data_ptr(),
        guidance_scale,
        out.data_ptr(),
        out.numel(),
    )
    return out


def backward(
    grad: Tensor, coefficients: Tensor, guidance_scale: float | None, model_dtype: torch.dtype
) -> Tensor:
    """The gradient of model_output in ``model_dtype``, from the dense gradient of x_prev."""
    out = compiled.empty_model_output(grad, guidance_scale, model_dtype)
    native.module().guided_ddim_step_backward(
        grad.data_ptr(),
        grad.numel(),
        coefficients.data_ptr(),
        guidance_scale,
        compiled.MODEL_DTYPES[model_dtype],
        out.data_ptr(),
        out.numel(),
    )
    return out
