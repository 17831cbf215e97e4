"""Which parts of a training step a plan can choose for, and by what name."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from rewardprop_fast import accelerate
from rewardprop_fast.memory.kinds import KINDS
from rewardprop_fast.memory.segments import Segment, reward_segments, unet_segments, vae_segments
from rewardprop_fast.models import architectures
from rewardprop_fast.rewards.shapes import tower


def count(segments: list[Segment]) -> dict[str, int]:
    return dict(Counter(segment.kind for segment in segments))


def are_what_they_are_called(segments: list[Segment], root: Any, name: str) -> bool:
    modules = dict(root.named_modules(prefix=name))
    for segment in segments:
        part = "" if segment.method == "forward" else f".{segment.method}"
        if modules[segment.name.removesuffix(part)] is not segment.module:
            return False
        if not callable(getattr(type(segment.module), segment.method)):
            return False
    names = [segment.name for segment in segments]
    return len(set(names)) == len(names) and {s.kind for s in segments} <= set(KINDS)


def test_of_the_published_unets() -> None:
    for name, blocks, resnets in (("sd15", 16, 22), ("sdxl", 70, 17)):
        with torch.device("meta"):
            unet = architectures.unet(name)
        stock = unet_segments(unet)
        assert count(stock) == {"step": 1, "transformer block": blocks, "resnet": resnets}
        accelerate(unet)
        fast = unet_segments(unet)
        parts = {"attention": 2 * blocks, "feed-forward": blocks}
        assert count(fast) == {**count(stock), **parts}
        assert are_what_they_are_called(fast, unet, "unet")
        assert fast[0].name == "unet"
        assert (
            "unet.mid_block.attentions.0.transformer_blocks.0.feed_forward",
            "feed-forward",
            "feed_forward",
        ) in [(s.name, s.kind, s.method) for s in fast]


def test_of_the_decoder() -> None:
    with torch.device("meta"):
        vae = architectures.autoencoder()
    accelerate(vae)
    segments = vae_segments(vae)
    # the middle block and four of two-times-up blocks with three resnets each
    assert count(segments) == {"decoder block": 5, "resnet": 14, "attention": 1}
    assert are_what_they_are_called(segments, vae, "vae")
    assert all(segment.name.startswith("vae.decoder.") for segment in segments)
    assert vae_segments(nn.Linear(1, 1)) == []


def test_outer_ones_come_before_those_within_them() -> None:
    with torch.device("meta"):
        vae = architectures.autoencoder()
    names = [segment.name for segment in vae_segments(vae)]
    for index, name in enumerate(names):
        assert not any(name.startswith(f"{later}.") for later in names[index:])


def test_of_a_reward() -> None:
    reward = tower("clip-l", torch.float32)
    segments = reward_segments(reward)
    assert count(segments) == {"reward block": 24}
    assert are_what_they_are_called(segments, reward, "reward")
    assert all(".layers." in segment.name for segment in segments)
    assert reward_segments(lambda images, prompts, metadata: images) == []


def test_of_a_reward_with_shared_layers_and_lists_within_lists() -> None:
    shared = nn.Linear(2, 2)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleList([shared, nn.Linear(2, 2), nn.ReLU()])
            self.b = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), shared)
            self.single = nn.Sequential(nn.ModuleDict({"x": nn.ModuleList([shared, shared])}))

    names = [segment.name for segment in reward_segments(Two())]
    assert names == ["reward.a.0", "reward.a.1", "reward.b.0"]
