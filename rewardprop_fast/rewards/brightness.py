"""A simple reward: how bright the picture is, or how close to a brightness."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from rewardprop_fast.errors import ConfigError

#: ITU-R BT.601, the luma of JPEG and of most image programs.
LUMA = (0.299, 0.587, 0.114)


class BrightnessReward(nn.Module):
    """Mean luma in [0, 1], or with ``target`` minus its squared distance to that, in [-1, 0].

    Raises ConfigError unless ``target`` is None or a number in [0, 1].
    """

    name = "brightness"

    def __init__(self, target: float | None = None) -> None:
        super().__init__()
        number = isinstance(target, int | float) and not isinstance(target, bool)
        if target is not None and not (number and math.isfinite(target) and 0 <= target <= 1):
            raise ConfigError(f"target must be a number from 0 to 1, or left out, got {target!r}.")
        self.target = target

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        mean = luma(images).mean(dim=(1, 2))
        return mean if self.target is None else -(mean - self.target).square()


def luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H, W), at least fp32: in bf16 a mean of many pixels would be coarse."""
    if images.element_size() < 4:
        images = images.float()
    red, green, blue = images.unbind(dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
