"""What the tests of memory plans share: tiny pipelines with a filled LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from rewardprop_fast import accelerate, lora
from rewardprop_fast.models.random_init import tiny_stable_diffusion, tiny_stable_diffusion_xl


@cache
def _pristine(kind: str) -> Any:
    return {"sd": tiny_stable_diffusion, "sdxl": tiny_stable_diffusion_xl}[kind]()


def make_pipeline(kind: str = "sd", dtype: torch.dtype = torch.float32, fast: bool = True) -> Any:
    """A frozen pipeline, "sd" or "sdxl", with a LoRA whose B is not zero, networks in ``dtype``.

    ``fast=False`` leaves diffusers' modules as they are.
    """
    pipe = copy.deepcopy(_pristine(kind))
    for network in (pipe.unet, pipe.vae):
        # torch's own: diffusers' warns of layers to be kept in float32, of which there are none
        nn.Module.to(network.requires_grad_(False), dtype, memory_format=torch.channels_last)
    lora.inject(pipe.unet, rank=2, target_modules="all-linear")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    if fast:
        accelerate(pipe)
    return pipe


@pytest.fixture
def pipeline() -> Callable[..., Any]:
    """`make_pipeline`, for tests that change what they get."""
    return make_pipeline
