"""A model's networks by their shapes alone, on the device "meta": for memory plans and reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from rewardprop_fast.models import architectures
from rewardprop_fast.models.load import BUNDLED
from rewardprop_fast.models.skeleton import load_skeleton


@dataclass
class Shapes:
    """What a pipeline has, as far as a training step needs it. The networks hold no memory.

    Attributes:
        tokens: length of an encoded prompt.
    """

    unet: Any
    vae: Any
    scheduler: Any
    tokens: int = 77

    @property
    def vae_scale_factor(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))


def load_shapes(model: str, dtype: torch.dtype) -> Shapes:
    """Frozen UNet and VAE in ``dtype``, on "meta".

    Args:
        model: "sd15", "sdxl", "bundled", or a pipeline's folder or hub name.

    Raises:
        ModelError: there is no such model.
    """
    if model in architectures.UNETS:
        with torch.device("meta"):
            unet, vae = architectures.unet(model, dtype), architectures.autoencoder(dtype)
        return Shapes(unet, vae, DDIMScheduler(**architectures.SCHEDULER))
    found = load_skeleton(model, with_vae=True)
    for network in (found.unet, found.vae):
        network.requires_grad_(False).eval()
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                weight = module.weight.data.contiguous(memory_format=torch.channels_last)
                module.weight.data = weight
    scheduler = DDIMScheduler.from_config(found.scheduler.config)
    return Shapes(found.unet, found.vae, scheduler, _tokens(model))


def _tokens(model: str) -> int:
    """As the text encoder's config says, where it lies in a folder; else CLIP's."""
    folder = BUNDLED if model == "bundled" else Path(model).expanduser()
    try:
        config = json.loads((folder / "text_encoder" / "config.json").read_text())
    except (OSError, ValueError):
        return Shapes.tokens
    return int(config.get("max_position_embeddings", Shapes.tokens))
