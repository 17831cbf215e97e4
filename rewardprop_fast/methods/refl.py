"""ReFL: the reward of the image predicted at one random late step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rewardprop_fast.methods.base import Method, Rollout
from rewardprop_fast.randomness import Draws
from rewardprop_fast.rollout import Sampler


@dataclass(frozen=True)
class ReFL(Method):
    """Reward feedback learning (ImageReward, 2304.05977, section 4.2, algorithm 1).

    A step t is drawn from the last quarter of the chain. The steps before it run without gradients;
    step t runs with them and leads straight to the predicted clean image,
    `x_0 = (x_t - sigma_t eps) / alpha_t`, which is decoded and rewarded. The paper draws t from the
    last 10 of 40 steps, maps the reward through relu(2 - r) and adds the pretraining loss to it;
    here the reward counts as it is (`RewardPropTrainer(loss=...)` takes another loss), and the
    pretraining loss is `train.regularisation.pretraining_coeff`, for every method.

    Attributes:
        last: share of the chain, at its end, that t is drawn from.
    """

    name: ClassVar[str] = "refl"

    last: float = 0.25

    def validate(self, steps: int) -> list[str]:
        if not 0 < self.last <= 1:
            return [f"last is {self.last}; allowed: above 0 and at most 1, a share of the steps."]
        return []

    def draw_step(self, steps: int, u: float) -> int:
        """The step with gradients, from u in [0, 1): one of the last, each equally likely."""
        count = max(1, math.floor(self.last * steps + 0.5))
        return steps - count + math.floor(u * count)

    def rollout(self, sampler: Sampler, latents: Tensor, draws: Draws) -> Rollout:
        i = self.draw_step(len(sampler), draws.uniform())
        x_t = sampler.run(latents, 0, i, gradients=False)
        x_0 = sampler.leaping(i, len(sampler)).run(x_t, i, i + 1, gradients=True)
        return Rollout(x_0, 1, 1)

    def gradient_steps(self, steps: int) -> int:
        return 1

    def common_steps(self, steps: int, draws: Draws) -> int:
        return self.draw_step(steps, draws.uniform())
