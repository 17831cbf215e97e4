"""TRL's truncation: which predictions of a chain carry a gradient, and what one batch draws.

The draws come from Python's and torch's global generators in the order in which TRL takes them, so
that one seed gives one run here and there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rewardprop_fast.compat.trl.config import AlignPropConfig
from rewardprop_fast.methods import Method, Rollout
from rewardprop_fast.randomness import Draws
from rewardprop_fast.rollout import Sampler


@dataclass(frozen=True)
class TRLDraws(Draws):
    """What one batch draws.

    Attributes:
        noise: (T, B, 4, h, w) for eta > 0.
        mask: for each of the T steps, whether its prediction carries a gradient.
    """

    noise: Tensor
    mask: tuple[bool, ...]

    def step_noise(self, steps: int, shape: Sequence[int]) -> Tensor:
        assert self.noise.shape == (steps, len(self.samples), *shape)
        return self.noise


@dataclass(frozen=True)
class PerStepTruncation(Method):
    """Step i's prediction is detached where the mask says so; the latents never are.

    With a random mask this is no suffix: behind the first gradient, a detached step keeps the
    linear path of the DDIM update.
    """

    name: ClassVar[str] = "trl"

    def validate(self, steps: int) -> list[str]:
        return []

    def rollout(self, sampler: Sampler, latents: Tensor, draws: Draws) -> Rollout:
        assert isinstance(draws, TRLDraws)
        return Rollout(sampler.run_masked(latents, 0, list(draws.mask)), 1, sum(draws.mask))


def draw_noise(
    config: AlignPropConfig, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x_T (B, 4, h, w) and the noise of each step (T, B, 4, h, w), drawn in ``dtype``.

    The noise is drawn also where eta is 0 and nothing of it is used: as TRL does.
    """
    latents, *noise = (
        torch.randn(shape, device=device, dtype=dtype) for _ in range(1 + config.sample_num_steps)
    )
    return latents, torch.stack(noise)


def draw_mask(config: AlignPropConfig) -> list[bool]:
    """For each step whether it carries a gradient; perhaps none does."""
    steps = range(config.sample_num_steps)
    if not config.truncated_backprop_rand:
        return [step >= config.truncated_backprop_timestep for step in steps]
    least, most = config.truncated_rand_backprop_minmax
    return [step >= random.randint(least, most) for step in steps]
