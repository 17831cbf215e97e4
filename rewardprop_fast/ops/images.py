"""Memory layouts of images: contiguous (NCHW) or channels_last (NHWC), as PyTorch decides it."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of these is: either of them decides; both at once is contiguous."""
    return any(
        not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
        for tensor in (x, weight)
    )


def memory_format(channels_last: bool) -> torch.memory_format:
    """PyTorch's name for it."""
    return torch.channels_last if channels_last else torch.contiguous_format
