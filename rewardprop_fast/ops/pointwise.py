"""Linear layers and 1x1 convolutions are one thing: rows of K numbers each, times a matrix.

An image (B, K, H, W) in channels_last memory already lies as B*H*W rows of K numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_matrix(weight: Tensor) -> Tensor:
    """(N, K, 1, 1) as (N, K); a matrix as it is."""
    return weight.reshape(weight.shape[:2]) if weight.dim() == 4 else weight


def as_rows(x: Tensor, weight: Tensor) -> Tensor:
    """An image as (B, H, W, K), a view; for a linear layer's weight x as it is."""
    return x.permute(0, 2, 3, 1) if weight.dim() == 4 else x


def as_pixels(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """(B, H, W, N) as an image again, in the memory format of ``x``."""
    if weight.dim() != 4:
        return y
    image = y.permute(0, 3, 1, 2)
    if x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return image.contiguous()
    return image


# --- checks shared by the operators with a frozen weight ---

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_frozen(operator: str, weight: Tensor, bias: Tensor | None) -> None:
    """Refuses a weight or bias whose gradient would be asked for and is never computed."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            plain = "conv2d" if weight.dim() == 4 else "linear"
            raise ValueError(
                f"{name} requires a gradient, and {operator} never computes one for it; freeze it "
                f"with {name}.requires_grad_(False), or use torch.nn.functional.{plain}."
            )


def check_base(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x, weight and bias of a linear layer or a 1x1 convolution fit each other."""
    check_dtype(x)
    if weight.dim() == 4:
        if tuple(weight.shape[2:]) != (1, 1):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; a convolution must be 1x1, (N, K, 1, 1)."
            )
        if x.dim() != 4 or x.shape[1] != weight.shape[1]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; with a weight {tuple(weight.shape)} it must be "
                f"(B, {weight.shape[1]}, H, W)."
            )
    else:
        if weight.dim() != 2:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; expected (N, K) or (N, K, 1, 1)."
            )
        if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; with a weight {tuple(weight.shape)} it must be "
                f"(..., {weight.shape[1]})."
            )
    if 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; no size may be 0.")
    check_alike(x, weight, bias)


def check_dtype(x: Tensor) -> None:
    """x is of one of the dtypes that networks compute in, or float64."""
    if x.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"x has dtype {x.dtype}; allowed are {names}.")


def check_alike(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The bias has a number for each output; weight and bias are of x's dtype, on its device."""
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; with a weight {tuple(weight.shape)} it must be "
            f"({weight.shape[0]},)."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be that of x, {x.dtype}.")
        check_device(name, tensor, x)


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    """All tensors are on the device of x."""
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; use one device.")
