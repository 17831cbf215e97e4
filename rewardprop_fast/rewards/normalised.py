"""A reward on another scale: so that a weight says the same of rewards of different units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.rewards.base import Reward, check_signature, evaluate, name_of


class Normalised(nn.Module):
    """``(reward - mean) / std`` with fixed numbers.

    Fixed, and not a running mean and spread, because those would change what is trained on while it
    is trained, shrink a reward's gradient the further it gets, and have to be kept in checkpoints.
    The mean does not change the gradient; it makes values readable: 0 is what the numbers were
    measured on, 1 is one standard deviation more.

    Raises:
        ConfigError: ``mean`` is no finite number, or ``std`` none above 0.
        RewardError: ``reward`` is no reward.
    """

    def __init__(self, reward: Reward, mean: float, std: float) -> None:
        super().__init__()
        check_signature(reward)
        for title, number in (("mean", mean), ("std", std)):
            good = isinstance(number, int | float) and not isinstance(number, bool)
            if not good or not math.isfinite(number) or (title == "std" and number <= 0):
                allowed = "above 0" if title == "std" else "that is finite"
                raise ConfigError(
                    f"The {title} of the reward {name_of(reward)!r} must be a number {allowed}, "
                    f"got {number!r}."
                )
        self.reward, self.mean, self.std = reward, float(mean), float(std)
        self.members: tuple[Reward, ...] = (reward,)
        self.name = name_of(reward)

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return (evaluate(self.reward, images, prompts, metadata) - self.mean) / self.std


@torch.no_grad()
def measure(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]] = ()
) -> tuple[float, float]:
    """(mean, standard deviation) of a reward over images (N, 3, H, W), N at least 2.

    Raises ConfigError where the spread is zero: such pictures cannot set a scale.
    """
    values = evaluate(reward, images, prompts, list(metadata) or [{} for _ in prompts]).double()
    std = float(values.std()) if len(values) > 1 else 0.0
    if not std > 0:
        raise ConfigError(
            f"The reward {name_of(reward)!r} is the same for all {len(values)} pictures, so they "
            "set no scale for it. Give more, or more different ones."
        )
    return float(values.mean()), std
