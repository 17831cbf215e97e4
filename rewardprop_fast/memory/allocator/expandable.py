"""Expandable segments: addresses first, memory page by page when it is needed."""

from __future__ import annotations

from bisect import bisect_left, insort

from rewardprop_fast.memory.allocator.blocks import Block, Pool
from rewardprop_fast.memory.allocator.segments import Driver

#: Addresses of one segment, more than any card has bytes.
_ADDRESSES = 2**50


class Expandable:
    """One segment: a chain of blocks that ends in addresses without memory."""

    def __init__(self, pool: Pool, driver: Driver, page: int) -> None:
        self._pool, self._driver, self._page = pool, driver, page
        self._begin = driver.addresses(_ADDRESSES)  # pages are counted from here
        tail = Block(self._begin, _ADDRESSES, mapped=False)
        self._bare = [tail.address]  # of the blocks without memory, sorted
        self._bare_at = {tail.address: tail}

    def find(self, size: int) -> Block | None:
        block = self._fitting(size) or self._grow(size)
        if block is not None:
            self._pool.remove(block)
        return block

    def release(self) -> None:
        """Take the memory from every page that lies wholly within a free block."""
        for block in sorted(self._pool.at.values(), key=lambda block: block.address):
            at = block.address - self._begin
            begin = -(-at // self._page) * self._page
            end = (at + block.size) // self._page * self._page
            if begin < end:
                self._unmap(block, self._begin + begin, self._begin + end)

    def _fitting(self, size: int) -> Block | None:
        """The smallest that fits; one before addresses that can grow counts as grown.

        So a larger block is taken before the one at the segment's end.
        """
        block = self._pool.fitting(size)
        if block is None:
            return None
        sizes = self._pool.sizes
        for index in range(bisect_left(sizes, (size, 0)) + 1, len(sizes)):
            other = self._pool.at[sizes[index][1]]
            if _grown(other) >= _grown(block):
                break
            block = other
        return block

    def _grow(self, size: int) -> Block | None:
        """A free block of at least this size, in the pool, made of the lowest addresses that do."""
        block = next(found for found in map(self._room_at, self._bare) if _room(found) >= size)
        if not block.mapped:
            mapped = self._map(block, min(block.size, size))
            if mapped is None:
                return None
            block = mapped
        while block.size < size:
            assert block.after is not None
            mapped = self._map(block.after, min(block.after.size, size - block.size))
            if mapped is None:
                return None
            block = mapped
        return block

    def _room_at(self, address: int) -> Block:
        """The block without memory there, or the free one just before it."""
        block = self._bare_at[address]
        before = block.before
        return before if before is not None and before.free else block

    def _map(self, block: Block, nbytes: int) -> Block | None:
        """Give memory to a block's first pages; returns the free block they have become part of."""
        nbytes = -(-nbytes // self._page) * self._page
        if not self._driver.take(nbytes):
            return None
        self._remove_bare(block)
        rest = block.cut(nbytes) if nbytes < block.size else None
        block.mapped = True
        if rest is not None:
            self._add_bare(rest)
        return self._pool.take_back(block)

    def _unmap(self, block: Block, begin: int, end: int) -> None:
        self._pool.remove(block)
        if begin > block.address:
            rest = block.cut(begin - block.address)
            self._pool.add(block)
            block = rest
        if end < block.address + block.size:
            self._pool.add(block.cut(end - block.address))
        block.mapped = False
        self._driver.give_back(block.size)
        self._add_bare(block)

    def _add_bare(self, block: Block) -> None:
        """Merged with neighbours that have no memory either."""
        after, before = block.after, block.before
        if after is not None and not after.mapped:
            self._remove_bare(after)
            block.absorb_after()
        if before is not None and not before.mapped:
            self._remove_bare(before)
            before.absorb_after()
            block = before
        insort(self._bare, block.address)
        self._bare_at[block.address] = block

    def _remove_bare(self, block: Block) -> None:
        self._bare.remove(block.address)
        del self._bare_at[block.address]


def _grown(block: Block) -> int:
    """Size of a free block with the addresses after it that it can grow into."""
    after = block.after
    return block.size + (after.size if after is not None and not after.mapped else 0)


def _room(block: Block | None) -> int:
    """Addresses from a block on until one that is handed out."""
    room = 0
    while block is not None and block.free:
        room += block.size
        block = block.after
    return room
