"""Direct-Align and SRPO: one step from a re-noised sample, a reward relative to words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rewardprop_fast.methods.base import Method, Rollout, Score
from rewardprop_fast.randomness import Draws
from rewardprop_fast.rollout import Sampler


@dataclass(frozen=True)
class SRPO(Method):
    """Direct-Align with semantic relative preference (2509.06942, sections 3.1 and 3.2).

    Direct-Align: a sample x_0 is drawn without gradients and noised to a random step i with a known
    eps, `x_i = alpha_i sg(x_0) + sigma_i eps`. The model takes one step with gradients, to the
    noise level j of `jump` steps later, and what noise is left is taken away with the known eps:

        x_0' = (x_j - sigma_j eps) / alpha_j
             = x_0 + (sigma_i / alpha_i - sigma_j / alpha_j) (eps - eps_theta)

    So x_0' is sharp at every noise level, and no rollout lies in the gradient's path. eps is drawn
    anew; the authors' code takes the sample's own x_T. The paper weights early steps above late
    ones, where rewards are cheated. Its code does that twice: levels are drawn along the curve
    `d s / (1 + (d - 1) s)` with d = 3 (its `shift`), and positive words weigh 1 + k, k the larger
    the earlier. Here levels are the schedule's, each equally likely, and that curve is the weight
    of step i's loss, s = 1 - i/T, d = `discount`; the form is this library's choice.

    SRPO: the reward is `r(x, positive + prompt) - r(x, negative + prompt)`. What the reward likes
    whatever the words say cancels; what is left is the direction of the words. Without words this
    is Direct-Align on the plain reward. The paper's second branch, which adds noise and descends,
    is left out, and so is its code's threshold, relu(0.7 - r).

    Attributes:
        positive, negative: words put before the prompt, as in "Realistic photo. a fox"; either may
            be empty. The reward must read prompts.
        jump: steps of the chain that the one step spans; T or more leads to the predicted x_0.
        discount: of late steps, 1 for none.
    """

    name: ClassVar[str] = "srpo"

    positive: str = ""
    negative: str = ""
    jump: int = 1
    discount: float = 3.0

    @property
    def relative(self) -> bool:
        """Whether the reward of other words is taken off."""
        return self.positive != self.negative

    def validate(self, steps: int) -> list[str]:
        problems = []
        if self.jump < 1:
            problems.append(f"jump is {self.jump}; allowed: a whole number of steps from 1.")
        if not self.discount > 0:
            problems.append(f"discount is {self.discount}; allowed: above 0, and 1 for none.")
        return problems

    def rollout(self, sampler: Sampler, latents: Tensor, draws: Draws) -> Rollout:
        steps, schedule = len(sampler), sampler.schedule
        i = math.floor(draws.uniform() * steps)
        j = min(i + self.jump, steps)
        x_0 = sampler.run(latents, 0, steps, gradients=False)
        eps = draws.extra_noise(0, x_0.shape[1:]).to(x_0)
        x_i = schedule.signal[i] * x_0 + schedule.noise[i] * eps
        x_j = sampler.leaping(i, j).run(x_i, i, i + 1, gradients=True)
        recovered = x_j
        if j < steps:
            recovered = (x_j - schedule.noise[j] * eps) / schedule.signal[j]
        share = 1 - i / steps
        weight = self.discount * share / (1 + (self.discount - 1) * share)
        return Rollout(recovered, 1, 1, weight)

    def score(
        self, reward: Score, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor:
        if not self.relative:
            return reward(images, _after(self.positive, prompts), metadata)
        # one call, so that the reward's networks run once a step
        texts = _after(self.positive, prompts) + _after(self.negative, prompts)
        liked, disliked = reward(torch.cat([images, images]), texts, metadata * 2).chunk(2)
        return liked - disliked

    def refuses(
        self, reward: Score, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[str]:
        if not self.relative or bool(self.score(reward, images, prompts, metadata).any()):
            return []
        return [
            f"gives the same value after {self.positive!r} as after {self.negative!r}, so srpo has "
            "no direction. Use a reward that reads the prompt, such as alignment, or leave "
            "positive and negative empty for Direct-Align on the plain reward."
        ]

    def gradient_steps(self, steps: int) -> int:
        return 1

    def plain_steps(self, steps: int) -> int:
        return steps

    def common_steps(self, steps: int, draws: Draws) -> int:
        return steps


def _after(words: str, prompts: list[str]) -> list[str]:
    return [f"{words}. {prompt}" for prompt in prompts] if words else prompts
