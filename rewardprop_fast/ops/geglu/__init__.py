"""GEGLU: the gated activation of diffusers' transformer blocks, in a single pass."""

from __future__ import annotations

from rewardprop_fast.ops.geglu.op import GEGLU, geglu

__all__ = ["GEGLU", "geglu"]
