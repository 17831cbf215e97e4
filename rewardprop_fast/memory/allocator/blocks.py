"""Blocks of addresses, and the pool of those that are free."""

from __future__ import annotations

from bisect import bisect_left, insort


class Block:
    """A run of addresses in a segment, between its neighbours there.

    Attributes:
        free: not handed out.
        mapped: has memory; only an expandable segment has blocks without.
    """

    __slots__ = ("address", "after", "before", "free", "mapped", "size")

    def __init__(self, address: int, size: int, mapped: bool = True) -> None:
        self.address, self.size = address, size
        self.before: Block | None = None
        self.after: Block | None = None
        self.free = True
        self.mapped = mapped

    def cut(self, size: int) -> Block:
        """Keep the first ``size`` bytes; returns the rest, a block of the same kind."""
        rest = Block(self.address + size, self.size - size, self.mapped)
        rest.before, rest.after = self, self.after
        if rest.after is not None:
            rest.after.before = rest
        self.after, self.size = rest, size
        return rest

    def absorb_after(self) -> None:
        """Take over the addresses of the next block."""
        after = self.after
        assert after is not None
        self.size += after.size
        self.after = after.after
        if self.after is not None:
            self.after.before = self


class Pool:
    """Free blocks with memory, the smallest first, the lowest address among equals."""

    def __init__(self, least_remainder: int) -> None:
        self.least_remainder = least_remainder
        self.sizes: list[tuple[int, int]] = []  # (size, address), sorted
        self.at: dict[int, Block] = {}  # by address

    def add(self, block: Block) -> None:
        insort(self.sizes, (block.size, block.address))
        self.at[block.address] = block

    def remove(self, block: Block) -> None:
        del self.sizes[bisect_left(self.sizes, (block.size, block.address))]
        del self.at[block.address]

    def fitting(self, size: int) -> Block | None:
        """The smallest free block of at least this size."""
        index = bisect_left(self.sizes, (size, 0))
        return self.at[self.sizes[index][1]] if index < len(self.sizes) else None

    def hand_out(self, block: Block, size: int) -> None:
        """Mark a block that is in no pool as used, and keep what it has too much."""
        if block.size - size >= self.least_remainder:
            self.add(block.cut(size))
        block.free = False

    def take_back(self, block: Block) -> Block:
        """Add a block that is free now, merged with its free neighbours; returns the merged one."""
        block.free = True
        before, after = block.before, block.after
        if after is not None and after.free and after.mapped:
            self.remove(after)
            block.absorb_after()
        if before is not None and before.free and before.mapped:
            self.remove(before)
            before.absorb_after()
            block = before
        self.add(block)
        return block
