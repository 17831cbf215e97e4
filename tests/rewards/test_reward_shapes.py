"""Towers of published sizes, without their weights."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory import make_fake
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
    assert TOWERS == ("clip-l", "clip-h")
    with pytest.raises(
        ConfigError, match=r"no reward of the shape 'clip-g'.*\['clip-l', 'clip-h'\]"
    ):
        tower("clip-g", torch.float32)
