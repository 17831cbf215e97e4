"""Towers of published sizes, without their weights."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from rewardprop_fast.cli.plan import _REWARDS
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory import make_fake
from rewardprop_fast.memory.segments import reward_segments
from rewardprop_fast.rewards import REWARDS
from rewardprop_fast.rewards.shapes import TOWERS, ShapedReward, tower


@pytest.mark.parametrize(
    ("name", "count", "tokens"),
    # parameters of the vision tower with its projection, of the published checkpoints
    [("clip-l", 303_966_208, 257), ("clip-h", 632_076_800, 257)],
)
def test_of_published_sizes(name: str, count: int, tokens: int) -> None:
    reward = tower(name, torch.bfloat16)
    assert sum(p.numel() for p in reward.vision.parameters()) == count
    held = [*reward.parameters(), *reward.buffers()]
    assert {tensor.device.type for tensor in held} == {"meta"}
    assert {tensor.dtype for tensor in held if tensor.is_floating_point()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in reward.parameters())
    assert not reward.training
    positions = reward.vision.vision_model.embeddings.position_embedding
    assert positions.num_embeddings == tokens
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_comes_through_to_the_image_in_its_dtype(dtype: torch.dtype) -> None:
    mode = FakeTensorMode()
    reward = make_fake(tower("clip-l", dtype), mode)
    with mode:
        images = torch.rand(2, 3, 64, 48, requires_grad=True)
        scores = reward(images, ["a", "b"], [{}, {}])
        assert scores.shape == (2,)
        assert scores.dtype == dtype
        (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.shape == images.shape
    assert gradient.dtype == torch.float32


def test_it_scores_as_the_tower_it_is_shaped_like(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "patch_size": 56, "projection_dim": 8}
    monkeypatch.setattr("rewardprop_fast.rewards.shapes._TOWERS", {"small": small})
    reward = ShapedReward("small", torch.float32)
    reward.text.copy_(torch.randn(1, 8))
    plain = CLIPVisionModelWithProjection(CLIPVisionConfig(**small)).eval()
    plain.load_state_dict(reward.vision.state_dict())
    images = torch.rand(3, 3, 224, 224)  # of the tower's own size, so that nothing is scaled
    features = plain((images - 0.5) / 0.27).image_embeds
    expected = (features @ reward.text[0]) / features.norm(dim=1) / reward.text.norm()
    torch.testing.assert_close(reward(images, [], []), expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_name() -> None:
    with pytest.raises(
        ConfigError, match=r"no reward of the shape 'clip-g'.*\['clip-l', 'clip-h', "
    ):
        tower("clip-g", torch.float32)


@pytest.mark.parametrize(
    ("name", "count", "blocks"),
    [
        ("pickscore", 632_076_800, 32),
        ("hps", 632_076_800, 32),
        ("clip_score", 303_966_208, 24),
        ("aesthetic", 303_966_208, 24),
        # ViT-L/16 and BERT with cross attention, no pooler: see test_reward_convert.py
        ("image_reward", 303_301_632 + 141_977_088, 36),
        # image tower; projection and scale; the head for classes; its norm
        ("detection", 87_860_736 + 393_216 + 1 + 393_728 + 1_538 + 1_536, 12),
    ],
)
def test_published_rewards_by_name(name: str, count: int, blocks: int) -> None:
    """Parameters, layers that memory plans may recompute, and a gradient to the image."""
    reward = tower(name, torch.bfloat16)
    assert sum(p.numel() for p in reward.parameters()) == count
    assert not any(p.requires_grad for p in reward.parameters())
    assert len(reward_segments(reward)) == blocks
    assert name in REWARDS
    mode = FakeTensorMode()
    make_fake(reward, mode)
    with mode:
        images = torch.rand(2, 3, 64, 48, requires_grad=True)
        scores = reward(images, ["a", "b"], [{}, {}])
        assert scores.shape == (2,)
        (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.shape == images.shape


def test_the_command_line_knows_them_all() -> None:
    assert set(_REWARDS) == {*TOWERS, "none"}
