"""Where new memory comes from: the driver, segment by segment."""

from __future__ import annotations

from typing import Protocol

from rewardprop_fast.memory.allocator.blocks import Block, Pool

MIB = 2**20

#: Up to this a request is small; from the second on it has a segment of its own.
SMALL, OWN = MIB, 10 * MIB

SMALL_SEGMENT, LARGE_SEGMENT, OWN_ROUND = 2 * MIB, 20 * MIB, 2 * MIB


class Driver:
    """Counts the memory that was taken from it.

    Attributes:
        reserved: bytes that are out.
        peak: most so far.
    """

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.reserved = self.peak = 0
        self._next_address = 0

    def take(self, nbytes: int) -> bool:
        """False if it has not that many left."""
        if self.capacity is not None and self.reserved + nbytes > self.capacity:
            return False
        self.reserved += nbytes
        self.peak = max(self.peak, self.reserved)
        return True

    def give_back(self, nbytes: int) -> None:
        self.reserved -= nbytes

    def addresses(self, nbytes: int) -> int:
        """Where a new segment begins: above all others, and never beside one."""
        address, self._next_address = self._next_address, self._next_address + nbytes
        return address


class Source(Protocol):
    """Gives a pool's requests memory."""

    def find(self, size: int) -> Block | None:
        """A free block of at least this size that is in no pool any more, old before new."""

    def release(self) -> None:
        """Give the driver back what nobody uses."""


class Segments:
    """A segment from the driver for each request that no free block can serve."""

    def __init__(self, pool: Pool, driver: Driver) -> None:
        self._pool, self._driver = pool, driver

    def find(self, size: int) -> Block | None:
        block = self._pool.fitting(size)
        if block is not None:
            self._pool.remove(block)
            return block
        nbytes = _segment_size(size)
        if not self._driver.take(nbytes):
            return None
        return Block(self._driver.addresses(nbytes), nbytes)

    def release(self) -> None:
        """A free block without neighbours is a whole segment."""
        for block in list(self._pool.at.values()):
            if block.before is None and block.after is None:
                self._pool.remove(block)
                self._driver.give_back(block.size)


def _segment_size(size: int) -> int:
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < OWN else -(-size // OWN_ROUND) * OWN_ROUND
