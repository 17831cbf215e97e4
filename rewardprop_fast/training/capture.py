"""From the setting `rollout.graphs` to who runs the steps without gradient."""

from __future__ import annotations

import warnings

import torch

from rewardprop_fast.memory.plan import Plan
from rewardprop_fast.rollout.graph import Cuda, Eager, GraphBackend, Strict


def choose(setting: str, device: torch.device, plan: Plan | None = None) -> GraphBackend:
    """The backend for "auto", "on", "off" or "strict" on a device.

    Where "on" cannot be had, steps are called, and a warning says why.
    """
    if setting == "strict":
        return Strict()
    if setting == "off" or (setting == "auto" and device.type != "cuda"):
        return Eager()
    if plan is not None and plan.residency == "phases":
        if setting == "on":
            warnings.warn(
                "Steps are called, not replayed: the memory plan moves weights by phase, and a "
                "captured step reads them where they were.",
                stacklevel=2,
            )
        return Eager()
    return Cuda(device, trial=setting == "auto")


def leaves_room(graphs: GraphBackend, plan: Plan) -> bool:
    """Whether what is held for replays fits into the plan's budget beside the step's own peak."""
    if plan.budget_bytes is None or not graphs.held_bytes:
        return True
    peak = int(plan.prediction.get("peak_bytes", plan.budget_bytes))
    return peak + graphs.held_bytes <= plan.budget_bytes
