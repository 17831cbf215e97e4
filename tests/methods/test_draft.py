"""DRaFT, DRaFT-K and DRaFT-LV on a chain whose gradients can be written down."""

from __future__ import annotations

import pytest
import torch

from rewardprop_fast.methods import DRaFT, DRaFTLV
from rewardprop_fast.randomness import Draws


def reward(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).exp().mean(1)


@pytest.mark.parametrize("k", [1, 2, 5, None])
def test_draft_k_is_the_last_k_steps(chain, k):
    toy = chain(5, batch=2)
    rollout = DRaFT(k).rollout(toy.sampler, toy.latents, Draws(0, 0, (0, 1)))
    count = k or 5
    assert (rollout.copies, rollout.gradient_steps) == (1, count)
    carried = toy.gradient(reward(rollout.latents).mean()) != 0
    assert carried.tolist() == [i >= 5 - count for i in range(5)]
    assert toy.unet.gradient_batches == [2] * count
    assert toy.unet.batches == [2] * (5 - count)
    whole = toy.sampler.run(toy.latents, 0, 5, gradients=False)
    assert torch.equal(rollout.latents, whole)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("n", [1, 3])
def test_lv_is_the_mean_of_its_samples(chain, n, eta):
    steps, batch = 4, 2
    toy, draws = chain(steps, batch, eta), Draws(4, 9, (6, 3))
    rollout = DRaFTLV(n).rollout(toy.sampler, toy.latents, draws)
    assert (rollout.copies, rollout.gradient_steps) == (1 + n, 1)
    assert toy.unet.gradient_batches == [(1 + n) * batch]  # one call for all endpoints
    assert toy.unet.batches == [batch] * steps  # and one rollout
    together = toy.gradient(reward(rollout.latents).mean())
    assert (together != 0).tolist() == [False] * (steps - 1) + [True]

    x1 = toy.sampler.run(toy.latents, 0, steps - 1, gradients=False)
    x0 = toy.sampler.run(x1, steps - 1, steps, gradients=False)
    alpha = toy.schedule.signal[-1].square()
    noise = [draws.extra_noise(i, x0.shape[1:]).double() for i in range(n)]
    starts = [x1, *(alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps for eps in noise)]
    gradients, ends = [], []
    for start in starts:
        ends.append(toy.sampler.run(start, steps - 1, steps, gradients=True))
        gradients.append(toy.gradient(reward(ends[-1]).mean()))
    assert torch.equal(rollout.latents, torch.cat(ends))
    torch.testing.assert_close(together, torch.stack(gradients).mean(0), rtol=1e-13, atol=0)
    assert torch.stack(gradients)[:, -1].unique().numel() == 1 + n  # all of them count


def test_the_extra_noise_is_fresh_for_every_copy_sample_and_step():
    values = {
        float(noise)
        for step in range(3)
        for copy in range(4)
        for noise in Draws(0, step, tuple(range(5))).extra_noise(copy, (1,))
    }
    assert len(values) == 3 * 4 * 5
    first, second = Draws(0, 0, (0, 1, 2)), Draws(0, 0, (2,))
    assert torch.equal(first.extra_noise(1, (4, 2))[2], second.extra_noise(1, (4, 2))[0])


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (DRaFT(0), "k is 0; allowed: 1 to the number of sampling steps, 10"),
        (DRaFT(11), "k is 11"),
        (DRaFTLV(0), "n is 0; allowed: 1 to 1023"),
        (DRaFTLV(1024), "n is 1024"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(method, words):
    (problem,) = method.validate(10)
    assert words in problem


def test_settings_that_do():
    for method in (DRaFT(), DRaFT(1), DRaFT(10), DRaFTLV(), DRaFTLV(1023)):
        assert method.validate(10) == []
