"""Latents to images, with the gradient kept, and images to latents."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """x_0 (B, 4, h, w) -> images (B, 3, H, W), float32 in [0, 1].

    Computed in the VAE's dtype. Values beyond [0, 1] are clamped as diffusers does, so their
    gradient is zero there.
    """
    config = vae.config
    latents = latents / config.scaling_factor
    if getattr(config, "latents_mean", None) is not None:
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        latents = latents * std + mean
    if getattr(config, "shift_factor", None) is not None:
        latents = latents + config.shift_factor
    images: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    wide = images if images.dtype.itemsize >= 4 else images.float()
    return (wide / 2 + 0.5).clamp(0, 1)


def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> latents (B, 4, h, w): the way back of `decode`.

    The mean of the encoder's distribution, so that nothing is drawn. Computed in the VAE's dtype.
    """
    config = vae.config
    given = (2 * images - 1).to(vae.dtype)
    latents: Tensor = vae.encode(given, return_dict=False)[0].mode()
    latents = latents if latents.dtype.itemsize >= 4 else latents.float()
    if getattr(config, "shift_factor", None) is not None:
        latents = latents - config.shift_factor
    if getattr(config, "latents_mean", None) is not None:
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        latents = (latents - mean) / std
    return latents * config.scaling_factor
