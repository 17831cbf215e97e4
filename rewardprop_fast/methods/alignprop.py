"""AlignProp: back-propagate through a random number of the last sampling steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rewardprop_fast.methods.base import Method, Rollout, run_suffix
from rewardprop_fast.methods.draft import DRaFT
from rewardprop_fast.randomness import Draws
from rewardprop_fast.rollout import Sampler

Distribution = Literal["uniform", "geometric"]


@dataclass(frozen=True)
class AlignProp(Method):
    """Randomized truncated back-propagation through time (2310.03739, section 3.2).

    K is drawn once per rollout and gradients flow through the last K steps: a true suffix. The
    paper draws K ~ U(0, T); here the least K is 1 by default, since K = 0 has no gradient at all.

    Attributes:
        k_min, k_max: K lies in [k_min, k_max]; k_max None is the number of sampling steps.
        distribution: "uniform", or "geometric": P(K = k) proportional to decay^(k - k_min), which
            spends most rollouts on short suffixes.
        decay: ratio of the geometric distribution, in (0, 1).
        trl_compat: draw the cut anew at every step, as TRL's AlignPropTrainer does. The mask is
            then no suffix: a step between two others may lack its gradient while the latents' own
            linear path stays. Only for comparison with numbers from there.
    """

    name: ClassVar[str] = "alignprop"

    k_min: int = 1
    k_max: int | None = None
    distribution: Distribution = "uniform"
    decay: float = 0.8
    trl_compat: bool = False

    def validate(self, steps: int) -> list[str]:
        problems = []
        k_max = steps if self.k_max is None else self.k_max
        least = 0 if self.trl_compat else 1
        if not least <= self.k_min <= k_max <= steps:
            problems.append(
                f"k_min is {self.k_min} and k_max {self.k_max}; allowed: {least} <= k_min <= k_max "
                f"<= {steps}, the number of sampling steps."
            )
        elif k_max == 0:
            problems.append("k_max is 0, so no step would ever carry a gradient; use 1 or more.")
        if self.distribution not in ("uniform", "geometric"):
            problems.append(f"distribution is {self.distribution!r}; allowed: uniform, geometric.")
        if not 0 < self.decay < 1:
            problems.append(f"decay is {self.decay}; allowed: above 0 and below 1.")
        return problems

    def draw_k(self, steps: int, u: float) -> int:
        """K for a chain of `steps` from u in [0, 1), by inverting the distribution function."""
        k_max = steps if self.k_max is None else self.k_max
        count = k_max - self.k_min + 1
        ratio = 1.0 if self.distribution == "uniform" else self.decay
        weights = [ratio**i for i in range(count)]
        threshold, below = u * sum(weights), 0.0
        for i, weight in enumerate(weights):
            below += weight
            if threshold < below:
                return self.k_min + i
        return k_max

    def rollout(self, sampler: Sampler, latents: Tensor, draws: Draws) -> Rollout:
        steps = len(sampler)
        if not self.trl_compat:
            return run_suffix(sampler, latents, self.draw_k(steps, draws.uniform()))
        mask = self._mask(steps, draws)
        return Rollout(sampler.run_masked(latents, 0, mask), 1, sum(mask))

    def _mask(self, steps: int, draws: Draws) -> list[bool]:
        """Which steps carry gradients, as TRL draws it."""
        cuts = [steps - self.draw_k(steps, u) for u in draws.uniforms(steps)]
        mask = [i >= cut for i, cut in enumerate(cuts)]
        mask[-1] = mask[-1] or not any(mask)  # one step at least, or there is nothing to learn from
        return mask

    def gradient_steps(self, steps: int) -> int:
        return steps if self.k_max is None or self.trl_compat else self.k_max

    def common_steps(self, steps: int, draws: Draws) -> int:
        if self.trl_compat:
            return self._mask(steps, draws).index(True)
        return steps - self.draw_k(steps, draws.uniform())

    def with_steps(self, k: int) -> Method:
        return DRaFT(k)
