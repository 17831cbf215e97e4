"""A pipeline's networks, frozen and where the run wants them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewardprop_fast.ops import mapped, onednn


def place(pipe: Any, device: torch.device, dtype: torch.dtype, accelerate: bool = True) -> None:
    """Freeze a pipeline's networks and move them to device, dtype and memory layout, in place.

    A VAE that overflows in float16 (SDXL's says so in its config) is kept in float32 there.

    Args:
        accelerate: the library's operators will be used, which make packed copies of weights.
    """
    for name, network in pipe.components.items():
        if not isinstance(network, torch.nn.Module):
            continue
        upcast = name == "vae" and dtype == torch.float16 and pipe.vae.config.force_upcast
        network.requires_grad_(False).eval()
        # nn.Module's own `to`: diffusers' override warns about every cast, with an empty list
        torch.nn.Module.to(network, device, torch.float32 if upcast else dtype)
    for network in (pipe.unet, pipe.vae):
        # convolutions run several times faster in NHWC, on CPUs and on tensor cores
        for module in network.modules():
            if not (accelerate and _is_read_from_a_file(module)):
                for parameter in module.parameters(recurse=False):
                    if parameter.ndim == 4:
                        parameter.data = parameter.data.contiguous(
                            memory_format=torch.channels_last
                        )


def _is_read_from_a_file(module: nn.Module) -> bool:
    """A convolution's weight in its model's file: a packed copy of it will be used, not itself."""
    if not isinstance(module, nn.Conv2d) or module.weight.device.type != "cpu":
        return False
    if onednn.why_no_gain(module.weight) is not None:
        return False  # it is used itself; the first of a network decides on the layout of images
    return mapped.lies_in_a_file(module.weight.data_ptr(), module.weight.nbytes)
