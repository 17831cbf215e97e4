"""Upsampling by two and a frozen 3x3 convolution, in four ninths of its multiplications."""

from __future__ import annotations

from rewardprop_fast.ops.frozen_upsample_conv2d.op import (
    FROZEN_UPSAMPLE_CONV2D,
    frozen_upsample_conv2d,
)

__all__ = ["FROZEN_UPSAMPLE_CONV2D", "frozen_upsample_conv2d"]
