"""SD 1.5's and SDXL's networks by their published shapes, without their weights.

For benchmarks, loading tests and memory estimates, where what counts is the shape. Sources: the
config.json files of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # diffusers' name for the number of heads
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}

#: SD's and SDXL's autoencoders have one shape.
AUTOENCODER: dict[str, Any] = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def unet(name: str, **changes: Any) -> UNet2DConditionModel:
    """The UNet of "sd15" or "sdxl", frozen, in evaluation mode; ``changes`` replace settings.

    Random weights from torch's generator, on torch's current default device and dtype: inside
    ``with torch.device("meta")`` it holds no memory.
    """
    return UNet2DConditionModel(**{**UNETS[name], **changes}).requires_grad_(False).eval()


def autoencoder(**changes: Any) -> AutoencoderKL:
    """The autoencoder of both, frozen, in evaluation mode; weights as for `unet`."""
    return AutoencoderKL(**{**AUTOENCODER, **changes}).requires_grad_(False).eval()


def unet_inputs(
    model: UNet2DConditionModel, batch: int, size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Random arguments of a UNet call for latents (batch, 4, size, size), channels last."""
    latents = torch.randn(batch, 4, size, size, dtype=dtype)
    inputs: dict[str, Any] = {
        "sample": latents.contiguous(memory_format=torch.channels_last),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(
            batch, 77, model.config.cross_attention_dim, dtype=dtype
        ),
    }
    if model.config.addition_embed_type == "text_time":
        width = model.config.projection_class_embeddings_input_dim
        width -= 6 * model.config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, width, dtype=dtype),
            "time_ids": torch.zeros(batch, 6, dtype=dtype),
        }
    return inputs
