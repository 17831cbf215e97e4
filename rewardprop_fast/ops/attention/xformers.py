"""Attention by xformers' memory-efficient kernels, through the functions that give LSE.

For whoever asks for it: where xformers can run, PyTorch's kernels can, and "sdpa" goes before it.
Its backward pass gives all three gradients, and may add them up in another order each time.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops.attention.reference import Needed, token_major

_DEVICE = "cuda"
#: dtype: the elements in 16 bytes, which the kernels read at once.
_ALIGNED = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}


def why_not(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """None where this form is legal, otherwise the reason it is not."""
    if q.device.type != _DEVICE:
        return f"it runs on CUDA devices, the tensors are on {q.device}"
    if q.dtype not in _ALIGNED:
        return f"q is {q.dtype}, it takes float32, bfloat16 and float16"
    if q.shape[-1] % _ALIGNED[q.dtype] != 0:
        return f"the width of a head must be a multiple of {_ALIGNED[q.dtype]} in {q.dtype}"
    if q.numel() == 0:
        return "there are no queries"
    try:
        _xformers()
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "xformers":
            return "xformers is not installed (pip install 'rewardprop-fast[xformers]')"
        return f"xformers does not load: {error}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """O (B, H, Lq, D), laid out (B, Lq, H, D), and LSE (B, H, Lq)."""
    out, lse = _xformers().memory_efficient_attention_forward_requires_grad(
        *map(_token_first, (q, k, v)), scale=scale
    )
    # Its kernels round the number of queries in LSE up; what lies past the end is not written.
    return _head_first(out), lse[..., : q.shape[2]].contiguous()


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needed: Needed,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as O is; those not needed have no elements."""
    grad, q, k, v, out = map(_token_first, (grad, q, k, v, out))
    # It pads LSE again, as the kernel that it chooses needs.
    found = _xformers().memory_efficient_attention_backward(grad, out, lse, q, k, v, scale=scale)
    dq, dk, dv = (
        _head_first(gradient) if need else q.new_empty(0)
        for gradient, need in zip(found, needed, strict=True)
    )
    return dq, dk, dv


def _xformers() -> Any:
    return import_module("xformers.ops")


def _token_first(tensor: Tensor) -> Tensor:
    """(B, L, H, D); a copy where a row does not begin at a multiple of 16 bytes."""
    tensor = tensor.transpose(1, 2)
    aligned = _ALIGNED[tensor.dtype]
    offsets = (tensor.storage_offset(), *tensor.stride()[:3])
    if tensor.stride(-1) == 1 and all(offset % aligned == 0 for offset in offsets):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _head_first(tensor: Tensor) -> Tensor:
    """(B, H, L, D), lying as (B, L, H, D)."""
    if tensor.is_contiguous():
        return tensor.transpose(1, 2)
    tensor = tensor.transpose(1, 2)
    return token_major(tensor).copy_(tensor)
