"""The two memory layouts of this operator: channels first (NCHW) and channels last (NHWC).

Both for any number of spatial dimensions: what torch calls channels_last is only for two of them.
A tensor that is both (one channel, one position) counts as channels first.
"""

from __future__ import annotations

from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the tensor is dense with its channels side by side."""
    return not tensor.is_contiguous() and tensor.movedim(1, -1).is_contiguous()


def in_layout(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor in one of the two layouts; a copy only where it is not there already."""
    if channels_last:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.contiguous()


def empty_like(tensor: Tensor) -> Tensor:
    """New memory of this shape and dtype, in the layout that `is_channels_last` says."""
    if is_channels_last(tensor):
        batch, channels, *spatial = tensor.shape
        return tensor.new_empty((batch, *spatial, channels)).movedim(-1, 1)
    return tensor.new_empty(tensor.shape)
