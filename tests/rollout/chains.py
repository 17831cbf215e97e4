"""What the tests of chains share: a sampler over a tiny pipeline, and its noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.rollout import Conditioning, Sampler, Schedule

T, BATCH = 5, 2


def sampler_of(pipe: Any, batch: int = BATCH, eta: float = 0.0, guided: bool = True) -> Sampler:
    """A chain of T steps with random conditions; its noise drawn where eta > 0."""
    generator = torch.Generator().manual_seed(3)
    dtype, config = pipe.unet.dtype, pipe.unet.config

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    width = config.cross_attention_dim
    parts = [drawn(batch, 7, width), drawn(batch, 7, width)]
    added: list[dict[str, Tensor]] = [{}, {}]
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * batch, dtype=dtype)
        added = [{"text_embeds": drawn(batch, pooled), "time_ids": sizes} for _ in range(2)]
    conditioning = (
        Conditioning(*parts, *added) if guided else Conditioning(parts[0], None, added[0])
    )
    schedule = Schedule.from_scheduler(pipe.scheduler, T, eta).to("cpu", torch.float32)
    noise = torch.randn(T, *latents(pipe, batch).shape, generator=generator) if eta else None
    return Sampler(pipe.unet, schedule, conditioning, 3.0, noise)


def latents(pipe: Any, batch: int = BATCH) -> Tensor:
    """x_T, (batch, 4, h, w)."""
    size = pipe.unet.config.sample_size
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(5))
