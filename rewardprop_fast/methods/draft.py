"""DRaFT and DRaFT-K: differentiate the reward through all, or the last K, sampling steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from rewardprop_fast.methods.base import Method, Rollout, run_suffix
from rewardprop_fast.randomness import Draws
from rewardprop_fast.rollout import Sampler


@dataclass(frozen=True)
class DRaFT(Method):
    """Direct reward fine-tuning (2309.17400, algorithm 1).

    Attributes:
        k: steps with gradients, the last K of the chain (DRaFT-K); None is all of them (DRaFT).
            The paper's best reward per compute is at K = 1.
    """

    name: ClassVar[str] = "draft"

    k: int | None = None

    def validate(self, steps: int) -> list[str]:
        if self.k is not None and not 1 <= self.k <= steps:
            return [
                f"k is {self.k}; allowed: 1 to the number of sampling steps, {steps}, or null for "
                "all of them."
            ]
        return []

    def rollout(self, sampler: Sampler, latents: Tensor, draws: Draws) -> Rollout:
        return run_suffix(sampler, latents, len(sampler) if self.k is None else self.k)

    def gradient_steps(self, steps: int) -> int:
        return steps if self.k is None else self.k

    def common_steps(self, steps: int, draws: Draws) -> int:
        return steps - self.gradient_steps(steps)

    def with_steps(self, k: int) -> DRaFT:
        return replace(self, k=k)
