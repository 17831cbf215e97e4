"""DRTune: gradients through a few steps all along the chain, none from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from rewardprop_fast.methods.base import Method, Rollout
from rewardprop_fast.randomness import Draws
from rewardprop_fast.rollout import Sampler


@dataclass(frozen=True)
class DRTune(Method):
    """Deep reward tuning (2405.00760, section 3.3 and algorithm 1).

    The input of every UNet call is detached, `eps = eps_theta(sg(x_t), t)`, so that x_0 depends on
    each step's eps through the update's linear path alone: no product of Jacobians that could
    explode, and an early step costs no more than a late one. Of the chain, K equally spaced steps
    carry gradients, from a random first one on. The chain ends m steps early, m drawn from
    0..early_stop, and the image predicted there is rewarded.

    Attributes:
        k: steps with gradients.
        early_stop: the most steps left out at the end; null is a quarter of them, as far as k
            steps remain. The paper draws, as here, one end for a whole rollout.
    """

    name: ClassVar[str] = "drtune"

    k: int = 3
    early_stop: int | None = None

    def validate(self, steps: int) -> list[str]:
        problems = []
        if not 1 <= self.k <= steps:
            problems.append(f"k is {self.k}; allowed: 1 to the number of sampling steps, {steps}.")
        elif self.early_stop is not None and not 0 <= self.early_stop <= steps - self.k:
            problems.append(
                f"early_stop is {self.early_stop}; allowed: 0 to {steps - self.k}, so that k = "
                f"{self.k} of {steps} steps remain, or null."
            )
        return problems

    def draw_steps(self, steps: int, u: float, v: float) -> tuple[int, list[int]]:
        """The number of steps that run, and those with gradients, from u and v in [0, 1)."""
        most = steps // 4 if self.early_stop is None else self.early_stop
        run = steps - math.floor(u * (min(most, steps - self.k) + 1))
        apart = run // self.k
        first = math.floor(v * (run - (self.k - 1) * apart))
        return run, [first + i * apart for i in range(self.k)]

    def rollout(self, sampler: Sampler, latents: Tensor, draws: Draws) -> Rollout:
        steps = len(sampler)
        run, chosen = self.draw_steps(steps, *draws.uniforms(2))
        chain = sampler.leaping(run - 1, steps) if run < steps else sampler
        mask = [i in chosen for i in range(run)]
        return Rollout(chain.run_masked(latents, 0, mask, detach_inputs=True), 1, self.k)

    def common_steps(self, steps: int, draws: Draws) -> int:
        _, chosen = self.draw_steps(steps, *draws.uniforms(2))
        return chosen[0]

    def gradient_steps(self, steps: int) -> int:
        return self.k

    def with_steps(self, k: int) -> DRTune:
        return replace(self, k=k, early_stop=0)
