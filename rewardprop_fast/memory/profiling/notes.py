"""What is noted of a run: its borders, and the calls of its units."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.multiprocessing.reductions import StorageWeakRef

from rewardprop_fast.memory.segments import Segment


@dataclass
class Mark:
    """A border: what begins or ends there, the most bytes since the one before, the bytes now."""

    kind: str  # "enter", "exit", "back", "end"
    call: int
    phase: str
    peak: int
    live: int
    seconds: float
    gradients: int


@dataclass
class Call:
    """One call of a unit."""

    segment: Segment
    mode: str
    signature: str
    step: int
    parts: frozenset[str]
    output: int = 0  # bytes
    inputs: int = 0
    given: list[tuple[StorageWeakRef, int]] = field(default_factory=list)
    held: tuple[int, ...] = ()
