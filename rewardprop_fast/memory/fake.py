"""Models on fake tensors: every shape and stride, no memory, no GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode


def make_fake(model: nn.Module, mode: FakeTensorMode, device: str = "cpu") -> nn.Module:
    """Replace every parameter and buffer of ``model`` by a fake tensor of ``device``; returns it.

    Build the model on the device "meta", add what is to be added (a LoRA: peft's own code does not
    work on fake tensors), then call this and run it inside ``mode``. Shared parameters stay shared.
    """
    known: dict[Tensor, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if parameter not in known:
                        known[parameter] = nn.Parameter(fake(parameter), parameter.requires_grad)
                    module._parameters[name] = known[parameter]  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = known.setdefault(buffer, fake(buffer))
    return model
