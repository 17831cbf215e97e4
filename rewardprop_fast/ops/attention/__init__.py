"""Softmax attention that keeps q, k, v, its output and one number per query for backward."""

from __future__ import annotations

from rewardprop_fast.ops.attention.op import ATTENTION, attention

__all__ = ["ATTENTION", "attention"]
