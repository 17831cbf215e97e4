"""rewards/base.py: good rewards pass, all misbehaviour is refused with a helpful message."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from rewardprop_fast import rewards
from rewardprop_fast.errors import RewardError
from rewardprop_fast.rewards.base import probe_images

PROMPTS, METADATA = ["a red apple", "a cat"], [{}, {}]


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


def refuse(reward, *words):
    with pytest.raises(RewardError) as info:
        rewards.probe(reward, 16, 24, PROMPTS, METADATA)
    message = str(info.value)
    for word in words:
        assert word in message, message
    return info.value


def test_a_good_reward_passes_and_its_values_come_back():
    values = rewards.probe(brightness, 16, 24, PROMPTS, METADATA)
    assert values.shape == (2,)
    assert not values.requires_grad
    torch.testing.assert_close(values, probe_images(16, 24).mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_reward_sees_the_dtype_of_the_run(dtype):
    seen = []

    def reward(images, prompts, metadata):
        seen.append(images.dtype)
        return brightness(images, prompts, metadata)

    values = rewards.probe(reward, 8, 8, dtype=dtype)
    assert seen == [dtype]
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (33, 17), (64, 96)])
def test_probe_images_are_not_degenerate_and_leave_the_random_state_alone(height, width):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    images = probe_images(height, width)
    assert torch.equal(torch.rand(4), expected)
    assert images.shape == (2, 3, height, width)
    assert images.min() >= 0.05
    assert images.max() <= 0.95
    assert (images.std(dim=(2, 3)) > 0.02).all()
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images, probe_images(height, width))


def test_prompts_and_metadata_of_the_run_are_used_and_repeated_to_the_batch():
    seen = []

    def reward(images, prompts, metadata):
        seen.append((prompts, metadata))
        return brightness(images, prompts, metadata)

    rewards.probe(reward, 8, 8, ["only one"], [{"n": 1}])
    rewards.probe(reward, 8, 8, ["a", "b", "c"], [{"n": 1}, {"n": 2}, {"n": 3}])
    assert seen[0] == (["only one", "only one"], [{"n": 1}, {"n": 1}])
    assert seen[1] == (["a", "b"], [{"n": 1}, {"n": 2}])


def test_no_gradient_is_refused_and_points_to_ddpo():
    refuse(
        lambda images, prompts, metadata: images.detach().mean(dim=(1, 2, 3)),
        "'lambda'",
        "no gradient",
        "DDPO",
    )


def test_no_grad_inside_is_refused():
    @torch.no_grad()
    def reward(images, prompts, metadata):
        return images.mean(dim=(1, 2, 3))

    refuse(reward, "no gradient", "DDPO")


def test_inference_mode_inside_is_refused():
    @torch.inference_mode()
    def reward(images, prompts, metadata):
        return images.mean(dim=(1, 2, 3))

    refuse(reward, "no gradient", "DDPO")


def test_a_gradient_that_does_not_reach_the_images_is_refused():
    weight = torch.ones(1, requires_grad=True)
    refuse(
        lambda images, prompts, metadata: images.detach().mean(dim=(1, 2, 3)) * weight,
        "none that reaches the images",
        "DDPO",
    )


def test_a_gradient_of_zero_everywhere_is_refused():
    refuse(
        lambda images, prompts, metadata: (255 * images).round().mean(dim=(1, 2, 3)),
        "zero at every pixel",
        "DDPO",
    )


def test_a_nonfinite_gradient_of_a_finite_reward_is_refused():
    refuse(
        lambda images, prompts, metadata: (images - images.detach()).sum(dim=(1, 2, 3)).sqrt(),
        "not finite",
        "sqrt",
    )


@pytest.mark.parametrize(
    ("shape_of", "words"),
    [
        (lambda v: v.mean(), ("()", "expected (2,)", "do not average")),
        (lambda v: v[:, None], ("(2, 1)", "reshape(-1)")),
        (lambda v: v[:1], ("(1,)", "expected (2,)")),
        (lambda v: v.repeat(2), ("(4,)", "expected (2,)")),
    ],
)
def test_a_wrong_shape_is_refused(shape_of, words):
    refuse(lambda i, p, m: shape_of(brightness(i, p, m)), *words)


@pytest.mark.parametrize(
    ("convert", "word"),
    [
        (lambda v: v.tolist(), "list"),
        (lambda v: v.detach().numpy(), "ndarray"),
        (lambda v: None, "NoneType"),
        (lambda v: (v, {}), "tuple"),
        (lambda v: (v > 0.5).long(), "int64"),
        (lambda v: v > 0.5, "bool"),
    ],
)
def test_what_is_no_float_tensor_is_refused(convert, word):
    refuse(lambda i, p, m: convert(brightness(i, p, m)), word)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_are_refused_and_the_prompt_is_named(bad):
    def reward(images, prompts, metadata):
        return brightness(images, prompts, metadata) + torch.tensor([0.0, bad])

    refuse(reward, str(bad), "image 1 of 2", "a cat")


def test_an_error_inside_is_chained_under_the_name_of_the_reward():
    def counts_objects(images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)) * metadata[0]["count"]

    error = refuse(counts_objects, "counts_objects", "KeyError", "count")
    assert isinstance(error.__cause__, KeyError)


def test_an_error_in_the_backward_pass_is_chained():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no backward here")

    error = refuse(
        lambda i, p, m: brightness(Broken.apply(i), p, m), "backward", "no backward here"
    )
    assert isinstance(error.__cause__, RuntimeError)


def test_changing_the_images_in_place_is_refused():
    refuse(lambda i, p, m: brightness(i.mul_(2), p, m), "in-place")


def test_running_out_of_memory_keeps_its_type():
    def reward(images, prompts, metadata):
        raise torch.cuda.OutOfMemoryError("too big")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        rewards.probe(reward, 8, 8)


class TwoArguments(nn.Module):
    def forward(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    "reward",
    [
        lambda images: images.mean(dim=(1, 2, 3)),
        lambda images, prompts: images.mean(dim=(1, 2, 3)),
        lambda images, prompts, metadata, extra: images.mean(dim=(1, 2, 3)),
        lambda *, images, prompts, metadata: images.mean(dim=(1, 2, 3)),
        TwoArguments(),
    ],
)
def test_other_arguments_than_the_three_are_refused_without_calling(reward):
    refuse(reward, "has the arguments", "reward(images, prompts, metadata)")


def test_defaults_and_star_arguments_are_welcome():
    rewards.probe(lambda i, p, m, scale=2.0: scale * brightness(i, p, m), 8, 8)
    rewards.probe(lambda *args: brightness(*args), 8, 8)


def test_not_callable_and_a_class_are_refused():
    refuse(0.5, "float", "not callable")
    refuse(TwoArguments, "is a class", "TwoArguments(...)")


def test_check_fills_no_grad_and_leaves_the_images_alone():
    layer = nn.Linear(3, 1)
    images = probe_images(8, 8)
    before = images.clone()

    def reward(images, prompts, metadata):
        return layer(images.mean(dim=(2, 3))).squeeze(1)

    rewards.check(reward, images, PROMPTS, METADATA)
    assert layer.weight.grad is None
    assert images.grad is None
    assert not images.requires_grad
    assert torch.equal(images, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_check_works_where_the_caller_has_switched_gradients_off(mode):
    with mode():
        images = probe_images(8, 8)
        assert rewards.check(brightness, images, PROMPTS, METADATA).shape == (2,)


def test_evaluate_keeps_the_gradient_and_returns_fp32_for_half_precision():
    images = probe_images(8, 8).bfloat16().requires_grad_(True)
    values = rewards.evaluate(brightness, images, PROMPTS, METADATA)
    assert values.dtype == torch.float32
    values.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / (3 * 8 * 8)))


def test_evaluate_hands_over_lists_the_reward_may_change():
    prompts, metadata = ("a", "b"), [{}, {}]

    def reward(images, prompts, metadata):
        prompts.clear()
        metadata.clear()
        return images.mean(dim=(1, 2, 3))

    rewards.evaluate(reward, probe_images(8, 8), prompts, metadata)
    assert prompts == ("a", "b")
    assert metadata == [{}, {}]


def test_prepare_freezes_modules_and_passes_functions_through():
    module = nn.Linear(2, 2).train()
    assert rewards.prepare(module, "meta") is module
    assert not module.training
    assert not module.weight.requires_grad
    assert module.weight.device.type == "meta"
    assert rewards.prepare(brightness, "cpu") is brightness


def test_names():
    class Named:
        name = "nice"

    assert rewards.name_of(Named()) == "nice"
    assert rewards.name_of(brightness) == "brightness"
    assert rewards.name_of(functools.partial(brightness, scale=2)) == "brightness"
    assert rewards.name_of(TwoArguments()) == "TwoArguments"
    assert rewards.name_of(lambda i, p, m: i) == "lambda"


class ByNature:
    """Has no gradient and says so."""

    name, differentiable = "count", False

    def __call__(self, images, prompts, metadata):
        return (images > 0.5).float().mean(dim=(1, 2, 3))


def test_a_reward_without_gradient_by_nature_is_refused_in_its_own_words():
    refuse(ByNature(), "'count' has no gradient by nature", "DDPO", "2305.13301")
    ensemble = rewards.Ensemble([(brightness, 1.0), (ByNature(), 1.0)])
    refuse(ensemble, "'count' has no gradient by nature")
    assert not rewards.is_differentiable(ensemble)
    assert rewards.is_differentiable(rewards.Ensemble([(brightness, 1.0)]))


@pytest.mark.parametrize(
    "reward", [ByNature(), rewards.Ensemble([(ByNature(), 2.0), (brightness, 1.0)])]
)
def test_where_no_gradient_is_needed_none_is_asked_for(reward):
    values = rewards.probe(reward, 16, 24, PROMPTS, METADATA, needs_gradient=False)
    expected = reward(probe_images(16, 24), PROMPTS, METADATA)
    torch.testing.assert_close(values, expected)
    assert not values.requires_grad


def test_where_no_gradient_is_needed_the_rest_is_still_asked_for():
    def one_value(images, prompts, metadata):
        return images.mean()

    with pytest.raises(RewardError, match="one value per image"):
        rewards.probe(one_value, 16, 24, PROMPTS, METADATA, needs_gradient=False)
    with pytest.raises(RewardError, match="arguments"):
        rewards.probe(lambda images: images, 16, 24, needs_gradient=False)


def test_the_compute_dtype_reaches_whoever_takes_it():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.own = nn.Linear(2, 2)

        def compute_in(self, dtype):
            self.inner.to(dtype)

        def forward(self, images, prompts, metadata):
            return images.mean(dim=(1, 2, 3))

    alone, member, other = Takes(), Takes(), nn.Linear(2, 2)
    rewards.prepare(alone, "cpu", torch.bfloat16)
    other.forward = brightness
    rewards.prepare(rewards.Ensemble([(member, 1.0), (other, 2.0)]), "cpu", torch.bfloat16)
    for reward in (alone, member):
        assert reward.inner.weight.dtype == torch.bfloat16
        assert reward.own.weight.dtype == torch.float32
    assert other.weight.dtype == torch.float32
    rewards.prepare(alone, "cpu")
    assert alone.inner.weight.dtype == torch.bfloat16
