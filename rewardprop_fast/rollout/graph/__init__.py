"""The step without gradient, captured once and replayed: fewer launches, the same bits."""

from __future__ import annotations

from rewardprop_fast.rollout.graph.backend import CaptureError, Eager, GraphBackend
from rewardprop_fast.rollout.graph.captured import Captured
from rewardprop_fast.rollout.graph.cuda import Cuda
from rewardprop_fast.rollout.graph.step import Step
from rewardprop_fast.rollout.graph.strict import Strict

__all__ = ["CaptureError", "Captured", "Cuda", "Eager", "GraphBackend", "Step", "Strict"]
