"""The specification of group normalisation with an optional SiLU, in plain PyTorch.

    xhat = (x - mean) rstd         mean and 1/sqrt(var + eps) over each group of channels
    z    = weight xhat + bias      group normalisation, arXiv 1803.08494
    y    = z sigmoid(z)            SiLU, arXiv 1702.03118; or y = z

Computed in float32, or in float64 where x is float64, and rounded once. The backward pass starts
from x, mean and rstd alone: z and the SiLU are computed again. With dz the gradient of z and the
means m over a group,

    dx = rstd (weight dz - m[weight dz] - xhat m[weight dz xhat])
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like ``x`` (B, C, *spatial); mean and rstd (B, G) in `compute_dtype`."""
    x_BGN = _grouped(x, num_groups)
    # Two passes; E[x^2] - E[x]^2 would cancel where the mean is large.
    mean_BG = x_BGN.mean(dim=2)
    var_BG = (x_BGN - mean_BG[..., None]).square().mean(dim=2)
    rstd_BG = (var_BG + eps).rsqrt()
    z = _affine(_normalised(x_BGN, mean_BG, rstd_BG).reshape(x.shape), weight, bias)
    y = z * z.sigmoid() if silu else z
    return y.to(x.dtype), mean_BG, rstd_BG


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]:
    """The gradients of x, weight and bias, of those that are needed, in this order."""
    num_groups = mean.shape[1]
    xhat = _normalised(_grouped(x, num_groups), mean, rstd).reshape(x.shape)
    grad_z = grad.to(xhat.dtype)
    if silu:
        z = _affine(xhat, weight, bias)
        s = z.sigmoid()
        grad_z = grad_z * (s * (1 + z * (1 - s)))

    x_needed, weight_needed, bias_needed = needs
    all_but_channels = [dim for dim in range(x.dim()) if dim != 1]
    gradients = []
    if x_needed:
        grad_xhat_BGN = _grouped(_affine(grad_z, weight, None), num_groups)
        xhat_BGN = _grouped(xhat, num_groups)
        mean_grad_BG1 = grad_xhat_BGN.mean(dim=2, keepdim=True)
        mean_product_BG1 = (grad_xhat_BGN * xhat_BGN).mean(dim=2, keepdim=True)
        grad_x_BGN = grad_xhat_BGN - mean_grad_BG1 - xhat_BGN * mean_product_BG1
        gradients.append((rstd[..., None] * grad_x_BGN).reshape(x.shape).to(x.dtype))
    if weight_needed:
        assert weight is not None
        gradients.append((grad_z * xhat).sum(all_but_channels).to(weight.dtype))
    if bias_needed:
        assert bias is not None
        gradients.append(grad_z.sum(all_but_channels).to(bias.dtype))
    return gradients


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(tensor: Tensor, num_groups: int) -> Tensor:
    """(B, G, N) of a tensor (B, C, *spatial), N = C / G * positions, in `compute_dtype`."""
    batch, channels, *spatial = tensor.shape
    elements = channels // num_groups
    for size in spatial:
        elements *= size
    return tensor.to(compute_dtype(tensor.dtype)).reshape(batch, num_groups, elements)


def _normalised(x_BGN: Tensor, mean_BG: Tensor, rstd_BG: Tensor) -> Tensor:
    return (x_BGN - mean_BG[..., None]) * rstd_BG[..., None]


def _affine(tensor: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight * tensor + bias, channel by channel."""
    shape = (-1, *[1] * (tensor.dim() - 2))
    if weight is not None:
        tensor = tensor * weight.to(tensor.dtype).reshape(shape)
    if bias is not None:
        tensor = tensor + bias.to(tensor.dtype).reshape(shape)
    return tensor
