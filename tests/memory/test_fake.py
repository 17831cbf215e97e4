"""Fake models: the same bytes as a real run, and none of them held."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor

from rewardprop_fast import lora
from rewardprop_fast.memory import MemoryTracker, make_fake
from rewardprop_fast.models import architectures

SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}


def peaks(model: Any) -> dict[str, int]:
    inputs = architectures.unet_inputs(model, 2, 16, torch.bfloat16)
    with MemoryTracker(model) as tracker:
        tracker.count(model)
        with tracker.phase("forward"):
            output = model(**inputs).sample
        with tracker.phase("backward"):
            output.float().square().mean().backward()
    return tracker.peak_by_phase


def test_a_fake_unet_with_a_lora_peaks_where_the_real_one_does() -> None:
    real = architectures.unet("sd15", torch.bfloat16, **SMALL)
    lora.inject(real, rank=4)
    with torch.device("meta"):
        fake = architectures.unet("sd15", torch.bfloat16, **SMALL)
    lora.inject(fake, rank=4)
    mode = FakeTensorMode()
    make_fake(fake, mode)
    assert all(isinstance(p, FakeTensor) and p.device.type == "cpu" for p in fake.parameters())
    with mode:
        found = peaks(fake)
    assert found == peaks(real)
    assert min(found.values()) > 0


def test_shared_parameters_stay_shared_and_flags_stay() -> None:
    with torch.device("meta"):
        a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        b.weight = a.weight
        a.bias.requires_grad_(False)
        model = torch.nn.Sequential(a, b, torch.nn.BatchNorm1d(3))
    make_fake(model, FakeTensorMode())
    assert a.weight is b.weight
    assert a.weight.requires_grad
    assert not a.bias.requires_grad
    assert isinstance(model[2].running_mean, FakeTensor)
