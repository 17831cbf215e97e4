"""Peak memory and modelled time of a training step, and the plan that fits it into a budget."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rewardprop_fast.memory import MemoryTracker, policy
from rewardprop_fast.memory.cost import CostCounter
from rewardprop_fast.memory.devices import Device
from rewardprop_fast.memory.measure import Holding
from rewardprop_fast.memory.plan import Plan
from rewardprop_fast.memory.planner import Limits, Planned, make_plan
from rewardprop_fast.memory.profile import Networks, Profile, profile
from rewardprop_fast.methods import DRaFTLV
from rewardprop_fast.training.dry_run import DryRun, gradient_steps_of


@dataclass(frozen=True)
class Estimate:
    """What a step holds under a plan.

    Attributes:
        peak: bytes alive at once, at most; by_phase: the same within each phase.
        resident: bytes alive all the time.
        holdings: what was alive at the peak, the largest first.
        log: sizes in the order of births (positive) and deaths (negative), bytes.
        phases: length of the log at the beginning of each phase, in order.
        seconds: modelled.
    """

    peak: int
    by_phase: dict[str, int]
    resident: int
    holdings: list[Holding]
    seconds: float


def estimate(
    dry: DryRun, plan: Plan, device: Device, gradient_steps: int | None = None
) -> Estimate:
    """Run a step on fake tensors under ``plan``: the bytes are those of the real step.

    Args:
        gradient_steps: run so many of the K steps; None is all.
    """
    engine, pipe = dry.engine, dry.engine.pipe
    counter = CostCounter()
    tracker = MemoryTracker(pipe.unet, watch=counter.see)
    held = dry.resident()  # by this name too: the optimizer's state is nowhere else
    resident = tracker.count(held)
    applied = policy.apply(plan, pipe.unet, pipe.vae, engine.reward)
    engine.watch = tracker.phase
    try:
        with tracker:
            dry.step(gradient_steps)
    finally:
        applied.remove()
    by_phase = {name: peak for name, peak in tracker.peak_by_phase.items() if name}
    return Estimate(
        tracker.peak_bytes,
        by_phase,
        resident,
        tracker.alive_at_peak(),
        device.total_seconds(counter.costs),
    )


def make_profile(dry: DryRun, device: Device) -> Profile:
    """What every part of the step costs in bytes and, on ``device``, seconds."""
    engine = dry.engine
    counter = CostCounter()

    def step(k: int, prefix: int, watch: Callable[[str], AbstractContextManager[None]]) -> None:
        engine.watch = watch
        dry.step(k, prefix)

    return profile(
        Networks(engine.pipe.unet, engine.pipe.vae, engine.reward),
        step,
        dry.resident(),
        gradient_steps_of(dry.config),
        lambda *operation: device.seconds(counter.see(*operation)),
    )


def plan_for(dry: DryRun, profiled: Profile, limits: Limits) -> Planned:
    """The fastest plan within ``limits`` for this step. Raises BudgetError."""
    config = dry.config
    k = gradient_steps_of(config)
    # DRaFT-LV takes its last step a second time without gradients
    prefix = config.sampling.steps - k + isinstance(config.method, DRaFTLV)
    return make_plan(profiled, k, prefix, limits)
