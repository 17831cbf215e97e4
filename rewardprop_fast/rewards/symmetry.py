"""A simple reward: how much the picture looks like its own mirror image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rewardprop_fast.errors import ConfigError

_DIMENSIONS = {"left-right": -1, "top-bottom": -2}


class SymmetryReward(nn.Module):
    """Minus the mean squared difference to the mirrored picture, in [-1, 0]; 0 is symmetric.

    Args:
        axis: "left-right" (what stands left stands right too) or "top-bottom".

    Raises:
        ConfigError: another axis.
    """

    name = "symmetry"

    def __init__(self, axis: str = "left-right") -> None:
        super().__init__()
        if axis not in _DIMENSIONS:
            raise ConfigError(f"axis is {axis!r}; allowed are {' and '.join(_DIMENSIONS)}.")
        self.dimension = _DIMENSIONS[axis]

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        if images.element_size() < 4:
            images = images.float()
        return -(images - images.flip(self.dimension)).square().mean(dim=(1, 2, 3))
