"""The specification of the guided DDIM step, in plain PyTorch.

    eps    = u + w (c - u)                 classifier-free guidance, arXiv 2207.12598
    x_prev = a x + b eps [+ sigma noise]   DDIM (arXiv 2010.02502, eq. 12) in its linear form

u and c are the halves of the batch. Faster forms keep this order of operations, each rounded once,
so that they can be compared bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    noise: Tensor | None,
) -> Tensor:
    """x_prev (B, C, h, w) in the dtype of ``latents``, computed in ``compute_dtype``."""
    dtype = compute_dtype(model_output.dtype, latents.dtype, coefficients.dtype)
    a, b, sigma = coefficients.to(dtype).unbind()
    eps = model_output.to(dtype)
    if guidance_scale is not None:
        eps = guided(eps, guidance_scale)
    x_prev = a * latents.to(dtype) + b * eps
    if noise is not None:
        x_prev = x_prev + sigma * noise.to(dtype)
    return x_prev.to(latents.dtype)


def guided(eps: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """u + w (c - u), (B, C, h, w), of [u, c], (2B, C, h, w)."""
    uncond, cond = eps.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def backward(
    grad: Tensor, coefficients: Tensor, guidance_scale: float | None, model_dtype: torch.dtype
) -> Tensor:
    """The gradient of ``model_output``, in its dtype, from ``grad`` (B, C, h, w), that of x_prev.

    It needs nothing that the forward pass computed: the step is linear in the model's output.
    """
    dtype = compute_dtype(grad.dtype, model_dtype, coefficients.dtype)
    grad_eps = coefficients[1].to(dtype) * grad.to(dtype)
    if guidance_scale is None:
        return grad_eps.to(model_dtype)
    halves = ((1.0 - guidance_scale) * grad_eps, guidance_scale * grad_eps)
    return torch.cat([half.to(model_dtype) for half in halves])


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any input has it, otherwise float32: never less, whatever the network uses."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
