"""The allocator itself, and a log played through it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rewardprop_fast.memory.allocator.blocks import Block, Pool
from rewardprop_fast.memory.allocator.expandable import Expandable
from rewardprop_fast.memory.allocator.segments import (
    LARGE_SEGMENT,
    SMALL,
    SMALL_SEGMENT,
    Driver,
    Segments,
    Source,
)

_ROUND = 512

#: (which, bytes): positive where it is allocated, negative where it is freed.
Event = tuple[int, int]


@dataclass(frozen=True)
class Reserved:
    """What a replay found, in bytes.

    Attributes:
        peak_rounded: most requested at once, each request rounded up to 512.
        peak_allocated: most in blocks that were handed out, with what was not cut off them:
            ``torch.cuda.max_memory_allocated``.
        peak_reserved: most taken from the driver: ``torch.cuda.max_memory_reserved``.
        reserved_at_peak: taken from the driver when most was handed out.
        out_of_memory_at: index of the event that did not fit into the capacity, where the replay
            ended; None if everything did.
    """

    peak_rounded: int
    peak_allocated: int
    peak_reserved: int
    reserved_at_peak: int
    out_of_memory_at: int | None = None

    @property
    def fragmentation(self) -> float:
        """The share of the reserved bytes that lay idle when most was handed out."""
        if not self.reserved_at_peak:
            return 0.0
        return 1 - self.peak_allocated / self.reserved_at_peak


def rounded(nbytes: int) -> int:
    """What a request is rounded up to."""
    return max(_ROUND, -(-nbytes // _ROUND) * _ROUND)


def replay(
    events: Iterable[Event], *, capacity: int | None = None, expandable_segments: bool = False
) -> Reserved:
    """Allocate and free in order.

    Args:
        events: (which, bytes) for an allocation, (which, -bytes) for its end. Requests of no bytes
            get no memory.
        capacity: bytes the driver can give; None for any number.
        expandable_segments: as ``PYTORCH_ALLOC_CONF=expandable_segments:True``.

    Raises:
        ValueError: something is allocated twice, or freed and not there.
    """
    allocator = Allocator(capacity, expandable_segments)
    peak_rounded = peak = reserved_at_peak = 0
    failed = None
    for index, (which, nbytes) in enumerate(events):
        if nbytes < 0:
            allocator.free(which)
        elif nbytes > 0:
            if not allocator.allocate(which, nbytes):
                failed = index
                break
            peak_rounded = max(peak_rounded, allocator.rounded)
            if allocator.allocated > peak:
                peak, reserved_at_peak = allocator.allocated, allocator.reserved
    return Reserved(peak_rounded, peak, allocator.peak_reserved, reserved_at_peak, failed)


class Allocator:
    """The state between two events.

    Attributes:
        rounded: bytes requested now, each request rounded up.
        allocated: bytes in blocks that are handed out.
    """

    def __init__(self, capacity: int | None = None, expandable_segments: bool = False) -> None:
        self.rounded = self.allocated = 0
        self._driver = Driver(capacity)
        self._used: dict[int, tuple[Pool, Block, int]] = {}
        small = Pool(_ROUND)
        large = Pool(_ROUND if expandable_segments else SMALL + 1)
        self._sources: dict[Pool, Source] = {}
        for pool, page in ((small, SMALL_SEGMENT), (large, LARGE_SEGMENT)):
            self._sources[pool] = (
                Expandable(pool, self._driver, page)
                if expandable_segments
                else Segments(pool, self._driver)
            )
        self._small, self._large = small, large

    @property
    def reserved(self) -> int:
        """Bytes taken from the driver."""
        return self._driver.reserved

    @property
    def peak_reserved(self) -> int:
        """Most so far."""
        return self._driver.peak

    def allocate(self, which: int, nbytes: int) -> bool:
        """Hand out a block; False if the driver cannot give what is missing."""
        if which in self._used:
            raise ValueError(f"{which} is allocated already.")
        size = rounded(nbytes)
        pool = self._small if size <= SMALL else self._large
        source = self._sources[pool]
        block = source.find(size)
        if block is None:
            for each in self._sources.values():
                each.release()
            block = source.find(size)
        if block is None:
            return False
        pool.hand_out(block, size)
        self._used[which] = pool, block, size
        self.rounded += size
        self.allocated += block.size
        return True

    def free(self, which: int) -> None:
        """Take a block back."""
        if which not in self._used:
            raise ValueError(f"{which} is freed and was not allocated.")
        pool, block, size = self._used.pop(which)
        self.rounded -= size
        self.allocated -= block.size
        pool.take_back(block)

    def used(self) -> list[Block]:
        """Blocks that are handed out, by address."""
        return sorted((block for _, block, _ in self._used.values()), key=lambda b: b.address)

    def idle(self) -> list[Block]:
        """Free blocks with memory, by address."""
        free = [block for pool in self._sources for block in pool.at.values()]
        return sorted(free, key=lambda b: b.address)
