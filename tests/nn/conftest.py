"""What the tests of accelerated models share: small pipelines of each kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from rewardprop_fast import lora
from rewardprop_fast.models import load_bundled
from rewardprop_fast.models.random_init import tiny_stable_diffusion, tiny_stable_diffusion_xl
from tests.nn.passes import fill

KINDS = ("bundled", "sd1", "sd2", "sdxl")


@cache
def _pristine(kind: str) -> Any:
    if kind == "bundled":
        return load_bundled()
    if kind == "sdxl":
        return tiny_stable_diffusion_xl()
    if kind == "sd1":
        return tiny_stable_diffusion()
    # SD 2.x: linear projections around the transformer, v-prediction.
    pipe = tiny_stable_diffusion(prediction_type="v_prediction")
    config = {**pipe.unet.config, "use_linear_projection": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.unet = UNet2DConditionModel.from_config(config).eval()
    return pipe


@pytest.fixture
def pipeline() -> Callable[..., Any]:
    """A fresh, frozen, channels-last pipeline of a kind in KINDS, with a filled LoRA or without."""

    def make(kind: str = "sd1", targets: Any = "all-linear", rank: int = 3) -> Any:
        pipe = copy.deepcopy(_pristine(kind))
        for network in (pipe.unet, pipe.vae):
            network.requires_grad_(False).to(memory_format=torch.channels_last)
        if targets is not None:
            lora.inject(pipe.unet, rank=rank, target_modules=targets)
            fill(pipe.unet)
        return pipe

    return make
