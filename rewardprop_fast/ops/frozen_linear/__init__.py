"""A linear layer or 1x1 convolution whose weight is frozen: nothing but the weight is kept."""

from __future__ import annotations

from rewardprop_fast.ops.frozen_linear.op import FROZEN_LINEAR, frozen_linear

__all__ = ["FROZEN_LINEAR", "frozen_linear"]
