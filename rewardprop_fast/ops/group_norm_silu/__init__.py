"""Group normalisation, with or without the SiLU that follows it, in two passes over memory."""

from __future__ import annotations

from rewardprop_fast.ops.group_norm_silu.op import GROUP_NORM_SILU, group_norm

__all__ = ["GROUP_NORM_SILU", "group_norm"]
