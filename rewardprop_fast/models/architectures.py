"""SD 1.5's and SDXL's networks by their published shapes, without their weights.

For benchmarks, loading tests and memory estimates, where what counts is the shape. Sources: the
config.json files of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

#: The noise schedule of both.
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def unet(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> UNet2DConditionModel:
    """The UNet of "sd15" or "sdxl", frozen, channels last; ``changes`` replace settings.

    Random weights from torch's generator, made in ``dtype`` on torch's current default device:
    inside ``with torch.device("meta")`` or ``FakeTensorMode()`` it holds no memory.
    """
    with _default_dtype(dtype):
        return _ready(UNet2DConditionModel(**{**UNETS[name], **changes}))


def autoencoder(dtype: torch.dtype = torch.float32, **changes: Any) -> AutoencoderKL:
    """The autoencoder of both, frozen, channels last; weights as for `unet`."""
    with _default_dtype(dtype):
        return _ready(AutoencoderKL(**{**AUTOENCODER, **changes}))


def _ready(model: Any) -> Any:
    """Frozen, in evaluation mode, convolutions channels last.

    Parameters are replaced, not converted: ``model.to`` does not work on fake tensors.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
            module.weight = torch.nn.Parameter(weight)
    return model.requires_grad_(False).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def unet_inputs(
    model: UNet2DConditionModel, batch: int, size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Random arguments of a UNet call for latents (batch, 4, size, size), channels last."""
    config: Any = model.config
    latents = torch.randn(batch, 4, size, size, dtype=dtype)
    inputs: dict[str, Any] = {
        "sample": latents.contiguous(memory_format=torch.channels_last),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim, dtype=dtype),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim
        width -= 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, width, dtype=dtype),
            "time_ids": torch.zeros(batch, 6, dtype=dtype),
        }
    return inputs
