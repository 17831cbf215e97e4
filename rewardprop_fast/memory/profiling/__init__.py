"""Running a step and noting what happens at the borders of its units."""

from __future__ import annotations

from rewardprop_fast.memory.profiling.run import Clock, Networks
from rewardprop_fast.memory.profiling.turns import profile

__all__ = ["Clock", "Networks", "profile"]
