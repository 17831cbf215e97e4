"""A plan that was made, and what is expected of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rewardprop_fast.memory.plan import Plan


@dataclass(frozen=True)
class Planned:
    """A plan and what is expected of it.

    Attributes:
        seconds: modelled, of the whole step; unlimited_seconds: with everything kept.
        peak: bytes; by_phase: the peak within each phase.
        offloaded: bytes a step that go to host memory.
        modes: (step, kind, mode) -> number of units, for people.
        at_peak: kind of unit -> bytes that units of this kind hold at the peak; "" is all the rest.
        timeline: gives (phase, most bytes, seconds) of every interval in the order they run, of the
            steps without gradients those that the profile has.
    """

    plan: Plan
    seconds: float
    unlimited_seconds: float
    peak: int
    by_phase: dict[str, int]
    offloaded: int
    modes: dict[tuple[str, str, str], int] = field(default_factory=dict)
    at_peak: dict[str, int] = field(default_factory=dict)
    timeline: Callable[[], list[tuple[str, int, float]]] = list
