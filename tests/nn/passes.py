"""A small pipeline run once, decoded and backward: for the tests and benchmarks.gpu_check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.models.architectures import unet_inputs


def fill(unet: Any, seed: int = 0) -> None:
    """An adapter as training might have left it: B is not zero, so that every gradient counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def cast(pipe: Any, dtype: torch.dtype) -> Any:
    """The networks in ``dtype``, adapters in float32, or in float64 with them."""
    for network in (pipe.unet, pipe.vae):
        torch.nn.Module.to(network, dtype)
        for name, parameter in network.named_parameters():
            if "lora_" in name and dtype != torch.float64:
                parameter.data = parameter.data.float()
    return pipe


def outputs(pipe: Any, size: int = 8, seed: int = 2) -> Tensor:
    """Images of one denoising step, decoded: through the whole UNet and decoder.

    Under some seeds the gradients hang on the last digits (seed 1 of the bundled model: twenty
    times as much as under others), so that errors there say nothing; this is none of them.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inputs = unet_inputs(pipe.unet, 2, size, torch.float32)
        channels = pipe.unet.config.in_channels
        inputs["sample"] = torch.randn(2, channels, size, size)
    dtype, device = pipe.unet.dtype, pipe.unet.device

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placed(part) for name, part in value.items()}
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    latents = pipe.unet(**placed(inputs)).sample
    images: Tensor = pipe.vae.decode(latents).sample
    return images


def with_gradients(pipe: Any, scale: float = 1.0, **options: Any) -> tuple[Tensor, Tensor]:
    """The images, and the gradients of all trained parameters as one vector, times ``scale``."""
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    images = outputs(pipe, **options)
    wide = images if images.dtype == torch.float64 else images.float()
    loss = scale * wide.sin().square().mean()
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    flat = [
        torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)
    ]
    return images.detach(), torch.cat([gradient.flatten() for gradient in flat])
