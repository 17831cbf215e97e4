"""Where memory goes: measured on a run, by storage; and what operations cost on which device."""

from __future__ import annotations

from rewardprop_fast.memory.allocator import Reserved, replay
from rewardprop_fast.memory.cost import Cost, CostCounter, cost_of
from rewardprop_fast.memory.devices import DEVICES, Device, find_device
from rewardprop_fast.memory.fake import make_fake
from rewardprop_fast.memory.measure import Holding, MemoryTracker
from rewardprop_fast.memory.offload import Offloader
from rewardprop_fast.memory.residency import Residency
from rewardprop_fast.memory.scheduling import SegmentTimes, Simulation, Statistics, simulate
from rewardprop_fast.memory.sizes import format_bytes, parse_bytes
from rewardprop_fast.memory.workspace import (
    Workspaces,
    cublas_workspace,
    measure_workspace,
    workspace_of,
)

__all__ = [
    "DEVICES",
    "Cost",
    "CostCounter",
    "Device",
    "Holding",
    "MemoryTracker",
    "Offloader",
    "Reserved",
    "Residency",
    "SegmentTimes",
    "Simulation",
    "Statistics",
    "Workspaces",
    "cost_of",
    "cublas_workspace",
    "find_device",
    "format_bytes",
    "make_fake",
    "measure_workspace",
    "parse_bytes",
    "replay",
    "simulate",
    "workspace_of",
]
