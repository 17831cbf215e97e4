"""Places in one allocation: aligned, first fit, merged again when they are given back."""

from __future__ import annotations

from bisect import bisect_left
from typing import TypeAlias

from rewardprop_fast.memory.scheduling.backend import Event

#: Bytes. Copy engines and vector loads want no more; a device's pages are larger.
ALIGNMENT = 512

#: An event with a number: of two in the same stream, the greater one is enough for both.
Fence: TypeAlias = tuple[int, Event]


class Slab:
    """Keeps account of a slab's bytes; holds no memory itself.

    A place that is given back may still be read by a copy that is queued: its fence lies behind it.

    Args:
        nbytes: of the whole slab.

    Attributes:
        used, peak: bytes in use now and at most so far, rounded up to `ALIGNMENT` each.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes - nbytes % ALIGNMENT
        self.used = self.peak = 0
        self._begins: list[int] = []  # of the free extents, sorted
        self._sizes: list[int] = []
        self._fences: list[Fence | None] = []
        if self.nbytes:
            self._insert(0, 0, self.nbytes, None)

    def take(self, nbytes: int) -> tuple[int, Fence | None] | None:
        """(offset, fence to wait for before writing there), or None where nothing fits."""
        size = rounded(nbytes)
        for index, free in enumerate(self._sizes):
            if free >= size:
                begin, fence = self._begins[index], self._fences[index]
                if free == size:
                    del self._begins[index], self._sizes[index], self._fences[index]
                else:
                    self._begins[index], self._sizes[index] = begin + size, free - size
                self.used += size
                if self.used > self.peak:
                    self.peak = self.used
                return begin, fence
        return None

    def give_back(self, offset: int, nbytes: int, fence: Fence | None = None) -> None:
        """The place of ``nbytes`` that `take` gave at ``offset`` is free behind the fence."""
        size = rounded(nbytes)
        self.used -= size
        index = bisect_left(self._begins, offset)
        if index < len(self._begins) and self._begins[index] == offset + size:
            size += self._sizes[index]
            fence = _later(fence, self._fences[index])
            del self._begins[index], self._sizes[index], self._fences[index]
        if index and self._begins[index - 1] + self._sizes[index - 1] == offset:
            self._sizes[index - 1] += size
            self._fences[index - 1] = _later(fence, self._fences[index - 1])
        else:
            self._insert(index, offset, size, fence)

    def _insert(self, index: int, begin: int, size: int, fence: Fence | None) -> None:
        self._begins.insert(index, begin)
        self._sizes.insert(index, size)
        self._fences.insert(index, fence)

    @property
    def extents(self) -> list[tuple[int, int]]:
        """The free ones: (offset, bytes), in order."""
        return list(zip(self._begins, self._sizes, strict=True))


def rounded(nbytes: int) -> int:
    """Up to `ALIGNMENT`, and no place is empty."""
    return max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)


def _later(a: Fence | None, b: Fence | None) -> Fence | None:
    if a is None or b is None:
        return a or b
    return a if a[0] >= b[0] else b
