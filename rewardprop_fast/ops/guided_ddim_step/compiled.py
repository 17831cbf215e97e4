"""Calls of the guided DDIM step in the compiled modules: _native and _cuda have the same functions.

``where`` is what _cuda asks for beside: the device and the stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MODEL_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def forward(
    module: Any,
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    noise: Tensor | None,
    **where: int,
) -> Tensor:
    """x_prev (B, C, h, w), float32. All tensors dense and in one memory format."""
    out = torch.empty_like(latents)
    module.guided_ddim_step(
        model_output=model_output.data_ptr(),
        model_output_count=model_output.numel(),
        model_dtype=MODEL_DTYPES[model_output.dtype],
        latents=latents.data_ptr(),
        noise=None if noise is None else noise.data_ptr(),
        coefficients=coefficients.data_ptr(),
        guidance_scale=guidance_scale,
        out=out.data_ptr(),
        count=out.numel(),
        **where,
    )
    return out


def backward(
    module: Any,
    grad: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    model_dtype: torch.dtype,
    **where: int,
) -> Tensor:
    """The gradient of model_output in ``model_dtype``, from the dense gradient of x_prev."""
    out = empty_model_output(grad, guidance_scale, model_dtype)
    module.guided_ddim_step_backward(
        grad=grad.data_ptr(),
        count=grad.numel(),
        coefficients=coefficients.data_ptr(),
        guidance_scale=guidance_scale,
        model_dtype=MODEL_DTYPES[model_dtype],
        out=out.data_ptr(),
        out_count=out.numel(),
        **where,
    )
    return out


def empty_model_output(
    grad: Tensor, guidance_scale: float | None, model_dtype: torch.dtype
) -> Tensor:
    """Memory for the gradient of model_output, in the memory format of the dense ``grad``."""
    batch = grad.shape[0] * (1 if guidance_scale is None else 2)
    layout = torch.contiguous_format if grad.is_contiguous() else torch.channels_last
    return torch.empty(
        (batch, *grad.shape[1:]), dtype=model_dtype, device=grad.device, memory_format=layout
    )
