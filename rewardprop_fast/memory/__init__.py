"""Where memory goes: measured on a run, by storage."""

from __future__ import annotations

from rewardprop_fast.memory.fake import make_fake
from rewardprop_fast.memory.measure import Holding, MemoryTracker

__all__ = ["Holding", "MemoryTracker", "make_fake"]
