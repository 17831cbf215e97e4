"""What every fast module asks before it takes its fast path; otherwise it runs as the original."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_plain(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether an operator computes what the original would: no autocast, no mixed dtypes."""
    kind = x.device.type  # autocast does not know the device "meta"
    return not (kind != "meta" and torch.is_autocast_enabled(kind)) and all(
        parameter is None or parameter.dtype == x.dtype for parameter in parameters
    )


def is_frozen(*parameters: Tensor | None) -> bool:
    """Whether no gradient of these will be asked for."""
    return not torch.is_grad_enabled() or not any(
        parameter is not None and parameter.requires_grad for parameter in parameters
    )


def has_hooks(*modules: nn.Module) -> bool:
    """Whether calling these modules does more than their forward: then they must be called."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )
