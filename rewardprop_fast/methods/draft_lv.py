"""DRaFT-LV: DRaFT-1 with extra re-noised endpoints, for a gradient of lower variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rewardprop_fast.methods.base import Method, Rollout
from rewardprop_fast.randomness import MAX_COPIES, Draws
from rewardprop_fast.rollout import Sampler


@dataclass(frozen=True)
class DRaFTLV(Method):
    """The low-variance form of DRaFT-1 (2309.17400, algorithm 2).

    One rollout gives x_0. From it n more inputs of the last step are made,
    `x_1 = alpha_1 sg(x_0) + sigma_1 eps_i`; the last step, the decoder and the reward then run once
    on the 1 + n endpoints of every image together, and the gradients are averaged.

    Attributes:
        n: extra endpoints per image; the paper uses 2.
    """

    name: ClassVar[str] = "draft_lv"

    n: int = 2

    def validate(self, steps: int) -> list[str]:
        if not 1 <= self.n < MAX_COPIES:
            return [f"n is {self.n}; allowed: 1 to {MAX_COPIES - 1} extra endpoints per image."]
        return []

    def rollout(self, sampler: Sampler, latents: Tensor, draws: Draws) -> Rollout:
        last = len(sampler) - 1
        schedule = sampler.schedule
        x1 = sampler.run(latents, 0, last, gradients=False)
        # x_0 is needed before its own gradient step, so that one UNet call can serve all endpoints.
        x0 = sampler.run(x1, last, last + 1, gradients=False)
        inputs = [x1]
        for i in range(self.n):
            noise = draws.extra_noise(i, x0.shape[1:]).to(x0)
            inputs.append(schedule.signal[last] * x0 + schedule.noise[last] * noise)
        copies = 1 + self.n
        noise_again = None if sampler.noise is None else sampler.noise.repeat(1, copies, 1, 1, 1)
        widened = sampler.repeat(copies, noise_again)
        endpoints = widened.run(torch.cat(inputs), last, last + 1, gradients=True)
        return Rollout(endpoints, copies, 1)

    def gradient_steps(self, steps: int) -> int:
        return 1

    def plain_steps(self, steps: int) -> int:
        return steps  # the last step is taken without gradients, too

    def common_steps(self, steps: int, draws: Draws) -> int:
        return steps - 1
