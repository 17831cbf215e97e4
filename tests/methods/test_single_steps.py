"""ReFL, DRTune and SRPO on a chain whose gradients can be written down."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rewardprop_fast.methods import SRPO, DRTune, ReFL
from rewardprop_fast.randomness import Draws


@pytest.mark.parametrize("last", [0.01, 0.25, 0.5, 1.0])
def test_refl_draws_one_of_the_last_steps_and_predicts_the_image_there(chain, last):
    steps, seen = 8, Counter()
    count = max(1, round(last * steps))
    for step in range(40):
        toy, draws = chain(steps, batch=2), Draws(0, step, (0, 1))
        rollout = ReFL(last).rollout(toy.sampler, toy.latents, draws)
        assert (rollout.copies, rollout.gradient_steps, rollout.weight) == (1, 1, 1.0)
        (i,) = (toy.gradient(rollout.latents.sum()) != 0).nonzero().flatten().tolist()
        assert toy.unet.gradient_batches == [2]
        assert toy.unet.batches == [2] * i
        x = toy.sampler.run(toy.latents, 0, i, gradients=False)
        alpha = toy.schedule.signal[i].square()
        eps = toy.unet.weight[toy.schedule.timesteps[i]] * x.sin()
        eps = eps * toy.sampler.conditioning.positive.mean((1, 2)).view(-1, 1, 1, 1)
        clean = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        torch.testing.assert_close(rollout.latents, clean, rtol=1e-12, atol=1e-12)
        seen[i] += 1
    assert set(seen) == set(range(steps - count, steps))


def test_drtune_spreads_its_steps_and_stops_early(chain):
    method, steps, ends = DRTune(k=3, early_stop=4), 12, set()
    for step in range(30):
        toy, draws = chain(steps), Draws(1, step, (0,))
        run, chosen = method.draw_steps(steps, *draws.uniforms(2))
        rollout = method.rollout(toy.sampler, toy.latents, draws)
        carried = (toy.gradient(rollout.latents.sum()) != 0).nonzero().flatten().tolist()
        assert carried == chosen
        assert len(carried) == 3
        assert carried[1] - carried[0] == carried[2] - carried[1] == run // 3
        assert len(toy.unet.batches) + len(toy.unet.gradient_batches) == run
        ends.add(run)
    assert ends == {8, 9, 10, 11, 12}


def test_drtunes_gradient_is_the_linear_path_alone(chain):
    """dx_0/dw_i = (product of the later a) b_i dout_i: no Jacobian of a later UNet call in it."""
    toy, draws = chain(6), Draws(1, 3, (0,))
    method = DRTune(k=2, early_stop=0)
    _, chosen = method.draw_steps(6, *draws.uniforms(2))
    got = toy.gradient(method.rollout(toy.sampler, toy.latents, draws).latents.sum())
    level = toy.sampler.conditioning.positive.mean()
    for i in chosen:
        x = toy.sampler.run(toy.latents, 0, i, gradients=False)
        a, b = toy.schedule.coefficients[:, 0], toy.schedule.coefficients[i, 1]
        wanted = a[i + 1 :].prod() * b * (x.sin() * level).sum()
        torch.testing.assert_close(got[i], wanted, rtol=1e-12, atol=0)


def test_srpo_recovers_the_sample_itself_where_the_model_knows_the_noise(chain):
    steps, levels = 5, set()
    for step in range(30):
        toy, draws = chain(steps, batch=2), Draws(0, step, (4, 2))
        x_0 = toy.sampler.run(toy.latents, 0, steps, gradients=False)
        eps = draws.extra_noise(0, x_0.shape[1:]).double()
        toy.unet.batches.clear()

        class Knowing(torch.nn.Module):
            dtype = torch.float64

            def __init__(self, inner, answer):
                super().__init__()
                self.inner, self.answer = inner, answer

            def forward(self, x, t, **rest):
                if not torch.is_grad_enabled():
                    return self.inner(x, t, **rest)
                self.seen = int(t)
                return (self.answer.clone().requires_grad_(),)

        knowing = Knowing(toy.unet, eps)
        object.__setattr__(toy.sampler, "unet", knowing)
        rollout = SRPO().rollout(toy.sampler, toy.latents, draws)
        torch.testing.assert_close(rollout.latents, x_0, rtol=1e-9, atol=1e-9)
        assert toy.unet.batches == [2] * steps
        levels.add(knowing.seen)
        share = 1 - toy.schedule.timesteps.tolist().index(knowing.seen) / steps
        assert rollout.weight == pytest.approx(3 * share / (1 + 2 * share))
    assert levels == set(toy.schedule.timesteps.tolist())


def test_srpo_scores_the_difference_that_words_make():
    seen = []

    def reward(images, prompts, metadata):
        seen.append((len(images), list(prompts), len(metadata)))
        scale = torch.tensor([float(len(text)) for text in prompts])
        return scale * images.mean((1, 2, 3))

    images = torch.rand(2, 3, 4, 4)
    method = SRPO("Real", "Painted")
    got = method.score(reward, images, ["a", "bc"], [{}, {}])
    assert seen == [(4, ["Real. a", "Real. bc", "Painted. a", "Painted. bc"], 4)]
    torch.testing.assert_close(got, -3 * images.mean((1, 2, 3)))
    assert method.refuses(reward, images, ["a", "bc"], [{}, {}]) == []
    (problem,) = method.refuses(lambda x, *_: x.mean((1, 2, 3)), images, ["a", "b"], [{}, {}])
    assert "srpo has no direction" in problem
    plain = SRPO().score(reward, images, ["a", "bc"], [{}, {}])
    torch.testing.assert_close(plain, torch.tensor([1.0, 2.0]) * images.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (ReFL(0.0), "last is 0.0; allowed: above 0 and at most 1"),
        (ReFL(1.5), "last is 1.5"),
        (DRTune(0), "k is 0; allowed: 1 to the number of sampling steps, 10"),
        (DRTune(11), "k is 11"),
        (DRTune(3, 8), "early_stop is 8; allowed: 0 to 7"),
        (DRTune(3, -1), "early_stop is -1"),
        (SRPO(jump=0), "jump is 0"),
        (SRPO(discount=0.0), "discount is 0.0"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(method, words):
    (problem,) = method.validate(10)
    assert words in problem


def test_settings_that_do():
    for method in (ReFL(), ReFL(1.0), DRTune(10), DRTune(3, 7), SRPO(), SRPO(jump=99)):
        assert method.validate(10) == []
        assert method.validate(10) == []
