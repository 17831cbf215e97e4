"""Copies between device and host beside the computation: who waits for what, on which device."""

from __future__ import annotations

from rewardprop_fast.memory.scheduling.backend import Backend, Buffer, Host
from rewardprop_fast.memory.scheduling.scheduler import Block, Scheduler, Statistics
from rewardprop_fast.memory.scheduling.simulate import SegmentTimes, Simulation, simulate

__all__ = [
    "Backend",
    "Block",
    "Buffer",
    "Host",
    "Scheduler",
    "SegmentTimes",
    "Simulation",
    "Statistics",
    "simulate",
]
