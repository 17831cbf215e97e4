"""A convolution with frozen weights, which keeps nothing for its gradient but them."""

from __future__ import annotations

from rewardprop_fast.ops.frozen_conv2d.op import FROZEN_CONV2D, frozen_conv2d

__all__ = ["FROZEN_CONV2D", "frozen_conv2d"]
