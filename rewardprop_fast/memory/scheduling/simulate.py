"""How long a step takes when some of its segments go to the host and come back: in virtual time.

The scheduler that runs the step is run without it: no tensors, no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewardprop_fast.memory.scheduling.backend import COMPUTE
from rewardprop_fast.memory.scheduling.scheduler import Block, Part, Scheduler
from rewardprop_fast.memory.scheduling.slab import rounded
from rewardprop_fast.memory.scheduling.virtual import VirtualDevice


@dataclass(frozen=True)
class SegmentTimes:
    """What one segment takes, without its copies.

    Attributes:
        forward, backward: seconds on the device.
        nbytes: that go to the host; 0 for a segment that keeps everything.
    """

    forward: float
    backward: float
    nbytes: int = 0


@dataclass(frozen=True)
class Simulation:
    """All of it modelled.

    Attributes:
        seconds: of the forward and the backward pass, waiting included.
        stall_seconds: waiting for copies.
        peak_host_bytes: most of the slab at once, with its alignment.
        peak_extra_device_bytes: most that was on the device at once of what goes to the host: not
            yet gone, or already back.
        stayed_bytes: that the slab had no room for; they are on the device from the forward to the
            backward pass of their segments, besides the extra ones.
    """

    seconds: float
    stall_seconds: float
    peak_host_bytes: int
    peak_extra_device_bytes: int
    stayed_bytes: int = 0


def simulate(
    segments: Sequence[SegmentTimes],
    to_host: float,
    to_device: float,
    window: int = 1,
    stash: int = 1,
    slab_bytes: int | None = None,
) -> Simulation:
    """The forward passes in order, then the backward passes in reverse.

    Args:
        to_host, to_device: bandwidths in bytes/s.
        window, stash: see `Scheduler`.
        slab_bytes: host memory; None for as much as it takes. What does not fit stays.
    """
    if slab_bytes is None:
        slab_bytes = sum(rounded(segment.nbytes) for segment in segments if segment.nbytes)
    device = VirtualDevice(to_host, to_device)
    scheduler = Scheduler(device, slab_bytes, window, stash)
    parts: list[tuple[Block, Part] | None] = []
    for segment in segments:
        block = None
        if segment.nbytes:
            scheduler.open("")
            part = scheduler.part
            device.compute(segment.forward)
            block = scheduler.send(segment.nbytes)
            scheduler.close()
        else:
            device.compute(segment.forward)
        parts.append((block, part) if block is not None else None)
    for segment, sent in zip(reversed(segments), reversed(parts), strict=True):
        if sent is not None:
            scheduler.need(*sent)
        device.compute(segment.backward)
        if sent is not None:
            scheduler.let_go(sent[0])
    return Simulation(
        device.ready[COMPUTE],
        device.stall_seconds,
        scheduler.slab.peak,
        device.peak_device_bytes,
        scheduler.counted.stayed_bytes,
    )
