"""The two memory layouts of this operator: channels first (NCHW) and channels last (NHWC).

Both for any number of spatial dimensions: what torch calls channels_last is only for two of them.
A tensor that is both (one channel, one position) counts as channels first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the tensor is dense with its channels side by side."""
    if tensor.is_contiguous():
        return False
    if tensor.dim() == 4:  # the usual case, without a view
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.movedim(1, -1).is_contiguous()


def in_layout(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor in one of the two layouts; a copy only where it is not there already."""
    if not channels_last:
        return tensor.contiguous()
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def empty_like(tensor: Tensor) -> Tensor:
    """New memory of this shape and dtype, in the layout that `is_channels_last` says."""
    if is_channels_last(tensor):
        return torch.empty_like(tensor)  # keeps the strides of what is dense
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
