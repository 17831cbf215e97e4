"""rewards/ensemble.py and rewards/colour.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewardprop_fast import rewards
from rewardprop_fast.errors import ConfigError, RewardError
from rewardprop_fast.rewards.base import probe_images

PROMPTS, METADATA = ["a", "b"], [{}, {}]
IMAGES = probe_images(12, 20)


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2))


def test_forward_is_the_weighted_sum_and_components_are_unweighted():
    ensemble = rewards.Ensemble([(brightness, 2.0), (redness, -0.5)])
    a, b = brightness(IMAGES, PROMPTS, METADATA), redness(IMAGES, PROMPTS, METADATA)
    parts = ensemble.components(IMAGES, PROMPTS, METADATA)
    assert list(parts) == ["brightness", "redness"]
    assert torch.equal(parts["brightness"], a)
    assert torch.equal(parts["redness"], b)
    torch.testing.assert_close(ensemble(IMAGES, PROMPTS, METADATA), 2 * a - 0.5 * b)
    torch.testing.assert_close(ensemble.combine(parts), 2 * a - 0.5 * b)
    assert rewards.name_of(ensemble) == "ensemble(brightness, redness)"


def test_gradient_is_the_weighted_sum_of_gradients():
    images = IMAGES.clone().requires_grad_(True)
    rewards.Ensemble({brightness: 3.0, redness: -1.0})(images, PROMPTS, METADATA).sum().backward()
    height, width = images.shape[-2:]
    expected = torch.full_like(images, 3.0 / (3 * height * width))
    expected[:, 0] -= 1.0 / (height * width)
    torch.testing.assert_close(images.grad, expected)


def test_equal_names_are_told_apart():
    red, blue, green = (rewards.ColourReward(c) for c in ((1, 0, 0), (0, 0, 1), (0, 1, 0)))
    ensemble = rewards.Ensemble([(red, 1), (blue, 1), (green, 10)])
    parts = ensemble.components(IMAGES, PROMPTS, METADATA)
    assert list(parts) == ["colour", "colour_2", "colour_3"]
    assert torch.equal(parts["colour_3"], green(IMAGES, PROMPTS, METADATA))
    torch.testing.assert_close(
        ensemble(IMAGES, PROMPTS, METADATA),
        parts["colour"] + parts["colour_2"] + 10 * parts["colour_3"],
    )


def test_a_suffix_does_not_collide_with_a_name_that_looks_like_one():
    def named(name):
        reward = rewards.ColourReward()
        reward.name = name
        return reward

    ensemble = rewards.Ensemble([(named(n), 1) for n in ("x_2", "x", "x")])
    assert len(set(ensemble.member_names)) == 3
    assert ensemble.member_names[:2] == ("x_2", "x")


@pytest.mark.parametrize("weight", [0, 0.0, float("nan"), float("inf"), "1", None, True])
def test_impossible_weights_are_refused(weight):
    with pytest.raises(ConfigError, match="weight of the reward 'brightness'"):
        rewards.Ensemble([(brightness, weight)])


def test_empty_and_ill_formed_lists_are_refused():
    with pytest.raises(ConfigError, match="at least one"):
        rewards.Ensemble([])
    with pytest.raises(ConfigError, match="pairs"):
        rewards.Ensemble([brightness])
    with pytest.raises(RewardError, match="has the arguments"):
        rewards.Ensemble([(lambda images: images.mean(), 1.0)])
    with pytest.raises(RewardError, match="is a class"):
        rewards.Ensemble([(rewards.ColourReward, 1.0)])


def test_the_error_of_a_member_names_it():
    def broken(images, prompts, metadata):
        raise KeyError("count")

    ensemble = rewards.Ensemble([(brightness, 1.0), (broken, 1.0)])
    with pytest.raises(RewardError, match="'broken' raised KeyError"):
        rewards.evaluate(ensemble, IMAGES, PROMPTS, METADATA)


def test_a_member_without_gradient_does_not_hide_behind_the_others():
    def counts(images, prompts, metadata):
        return (images > 0.5).float().sum(dim=(1, 2, 3))

    inner = rewards.Ensemble([(redness, 1.0), (counts, 1.0)])
    with pytest.raises(RewardError, match="'counts' gives no gradient"):
        rewards.probe(rewards.Ensemble([(brightness, 1.0), (inner, 1.0)]), 8, 8)


def test_half_precision_members_are_summed_in_fp32():
    ensemble = rewards.Ensemble([(brightness, 1.0), (redness, 1e-4)])
    values = ensemble(IMAGES.bfloat16(), PROMPTS, METADATA)
    a = brightness(IMAGES.bfloat16(), PROMPTS, METADATA).float()
    b = redness(IMAGES.bfloat16(), PROMPTS, METADATA).float()
    assert values.dtype == torch.float32
    assert torch.equal(values, a + 1e-4 * b)
    assert not torch.equal(values, a)


def test_modules_move_and_freeze_with_the_ensemble():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, images, prompts, metadata):
            return self.layer(images.mean(dim=(2, 3))).squeeze(1)

    learned = Learned()
    ensemble = rewards.Ensemble([(learned, 1.0), (brightness, 1.0)])
    rewards.prepare(ensemble, "cpu")
    assert not learned.layer.weight.requires_grad
    assert not learned.training
    assert rewards.probe(ensemble, 8, 8).shape == (2,)


def test_colour_is_best_on_its_colour_and_gives_minus_the_mean_square():
    reward = rewards.ColourReward([0.2, 0.4, 0.6])
    exact = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert reward(exact, ["x"], [{}]).item() == 0.0
    white = reward(torch.ones(1, 3, 8, 8), ["x"], [{}]).item()
    assert white == pytest.approx(-(0.64 + 0.36 + 0.16) / 3)
    rewards.probe(reward, 8, 8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "colour", [(1, 0), (1, 0, 0, 0), (2, 0, 0), "red", None, (1, 0, float("nan"))]
)
def test_impossible_colours_are_refused(colour):
    with pytest.raises(ConfigError, match="three numbers"):
        rewards.ColourReward(colour)


# ---------------------------------------------------------------------- on one scale


def pictures(count=6):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_normalised_reward_is_that_reward_on_another_scale():
    images, prompts, facts = pictures(), ["p"] * 6, [{}] * 6
    plain = rewards.build("colour", colour=[0, 1, 0])
    mean, std = rewards.measure(plain, images, prompts)
    values = plain(images, prompts, facts).double()
    assert (mean, std) == pytest.approx((values.mean().item(), values.std().item()))
    scaled = rewards.Normalised(plain, mean, std)
    found = scaled(images, prompts, facts)
    torch.testing.assert_close(found.double(), (values - mean) / std, rtol=1e-4, atol=1e-5)
    assert rewards.name_of(scaled) == "colour"
    assert rewards.probe(scaled, 8, 8).shape == (2,)


def test_members_of_different_units_weigh_the_same_once_normalised():
    images, prompts, facts = pictures(), ["p"] * 6, [{}] * 6
    pairs = [(rewards.build("colour"), 1.0), (rewards.build("jpeg_incompressibility"), -2.0)]
    ensemble = rewards.Ensemble(pairs).normalised(images, prompts)
    parts = ensemble.components(images, prompts, facts)
    assert list(parts) == ["colour", "jpeg_incompressibility"]
    for values in parts.values():
        assert abs(values.mean()) < 1e-3
        assert values.std() == pytest.approx(1, rel=1e-3)
    expected = parts["colour"] - 2 * parts["jpeg_incompressibility"]
    torch.testing.assert_close(ensemble(images, prompts, facts), expected)


def test_a_normalised_member_is_checked_frozen_and_given_the_dtype_as_others():
    reward = rewards.build_all(
        [("jpeg_size", 1.0, {}, (-3.0, 0.5)), ("colour", 1.0, {}, None), ("brightness", 2.0, {})]
    )
    assert reward.weights == (1.0, 1.0, 2.0)
    assert not rewards.is_differentiable(reward)
    with pytest.raises(RewardError, match="'jpeg_size' has no gradient by nature"):
        rewards.probe(reward, 8, 8)
    alone = rewards.build_all([("colour", 1.0, {}, (0.5, 2.0))])
    assert isinstance(alone, rewards.Normalised)


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [(0, 0, "std"), (0, -1, "std"), (float("nan"), 1, "mean"), ("0", 1, "mean"), (0, True, "std")],
)
def test_impossible_scales_are_refused(mean, std, words):
    with pytest.raises(ConfigError, match=f"{words} of the reward 'colour'"):
        rewards.Normalised(rewards.build("colour"), mean, std)


def test_pictures_that_are_all_alike_set_no_scale():
    flat = torch.zeros(3, 3, 8, 8)
    with pytest.raises(ConfigError, match="'colour' is the same for all 3"):
        rewards.measure(rewards.build("colour"), flat, ["p"] * 3)
