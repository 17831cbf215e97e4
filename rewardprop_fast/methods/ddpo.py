"""DDPO: policy gradients over the denoising steps, for any reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rewardprop_fast.methods.base import Method, Rollout
from rewardprop_fast.methods.draft import DRaFT
from rewardprop_fast.randomness import Draws
from rewardprop_fast.rollout import Sampler


@dataclass(frozen=True)
class DDPO(Method):
    """Denoising diffusion policy optimization (2305.13301, section 4.3), with importance sampling.

    Each DDIM step with eta > 0 is an action, drawn from `N(mu_theta(x_t), sigma_t^2)`. Samples are
    drawn and rewarded without gradients; then PPO's clipped objective (1707.06347, equation 7),

        -mean min(w A, clip(w, 1 - c, 1 + c) A),  w = p_theta(x_{t-1} | x_t) / p_old(x_{t-1} | x_t),

    is descended for several epochs over the same samples. A is the reward less its mean over its
    standard deviation, both of the prompt's last rewards once there are enough of them, and of the
    update's until then. As in the authors' code log-probabilities are means over the latents'
    elements, not sums: `clip_range` is to be read with that.

    Attributes:
        clip_range: c.
        inner_epochs: passes over the same samples.
        minibatches: updates of the weights in a pass, each from its share of the batches, in the
            order in which they were drawn (the authors' code shuffles them).
        advantage_clip: A is kept within +- this.
        history: rewards remembered for each prompt.
        least_history: rewards a prompt must have for its own mean and deviation to count.
    """

    name: ClassVar[str] = "ddpo"
    needs_reward_gradient: ClassVar[bool] = False

    clip_range: float = 1e-4
    inner_epochs: int = 1
    advantage_clip: float = 10.0
    history: int = 16
    least_history: int = 16
    minibatches: int = 1

    def validate(self, steps: int) -> list[str]:
        problems = []
        for name in ("clip_range", "advantage_clip"):
            if not getattr(self, name) > 0:
                problems.append(f"{name} is {getattr(self, name)}; allowed: above 0.")
        for name in ("inner_epochs", "minibatches"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}; allowed: a whole number from 1.")
        if not 2 <= self.least_history <= self.history:
            problems.append(
                f"history is {self.history} and least_history {self.least_history}; allowed: "
                "2 <= least_history <= history."
            )
        return problems

    def refuses_eta(self, eta: float) -> list[str]:
        if eta > 0:
            return []
        return [
            "got 0.0 with method ddpo, whose actions are the noise of the steps; allowed: above 0. "
            "The paper has 1."
        ]

    def refuses_batches(self, batches: int) -> list[str]:
        if self.minibatches < 1 or batches % self.minibatches == 0:
            return []
        return [
            f"got {batches} with method ddpo in {self.minibatches} minibatches; allowed: a "
            "multiple of that."
        ]

    def rollout(self, sampler: Sampler, latents: Tensor, draws: Draws) -> Rollout:
        """Without gradients; every state of the chain comes along."""
        states = [latents]
        for i in range(len(sampler)):
            states.append(sampler.run(states[-1], i, i + 1, gradients=False))
        return Rollout(states[-1], 1, len(sampler), trajectory=torch.stack(states))

    @staticmethod
    def log_probability(action: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
        """Of x_{t-1} (B, 4, h, w), (B,): a mean over elements, without constants that cancel."""
        return -((action - mean) / sigma).square().flatten(1).mean(1) / 2

    def objective(self, now: Tensor, then: Tensor, advantages: Tensor) -> Tensor:
        """PPO's loss, () from log-probabilities and advantages, (B,) each."""
        ratio = (now - then).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return torch.maximum(-advantages * ratio, -advantages * clipped).mean()

    def gradient_steps(self, steps: int) -> int:
        return 1  # at once: each step's gradient is computed by itself

    def plain_steps(self, steps: int) -> int:
        # as modelled time, a step with gradients counts for three
        return steps + 3 * (steps * self.inner_epochs - 1)

    def with_steps(self, k: int) -> DRaFT:
        """DRaFT-1 holds what one step of DDPO holds, and the decoder's graph on top."""
        return DRaFT(k)
