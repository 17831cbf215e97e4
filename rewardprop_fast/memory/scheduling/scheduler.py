"""When what a segment saved goes to the host, when it leaves the device, when it comes back.

Forward, segment after segment: each block is copied out behind the computation that made it, and
its device memory is let go of at the end of the segment after next (`stash`), behind the end of the
copy. That is decided by the order of the program and not by asking whether the copy has finished: a
host that queues work ahead of the device would be told "no" every time, and free nothing.

Backward, in reverse: what a segment needs is copied in when the segment after it begins its own
backward pass (`window`), into memory taken from the computation's allocator; the computation waits
for it only when it asks for it. The last segments, which have not left yet, just stay.

A scheduler knows nothing of autograd and tensors. It is not for several threads at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from rewardprop_fast.memory.scheduling.backend import BACK, COMPUTE, OUT, Backend, Buffer
from rewardprop_fast.memory.scheduling.slab import Fence, Slab


class OffloadError(RuntimeError):
    """A saved tensor cannot be given back as it was."""


#: Where a block is: still on the device and on its way out; on the host alone; on its way back; on
#: the device to stay; nowhere. Plain numbers, since a plan asks for thousands of simulated steps.
LEAVING, HOST, COMING, HERE, GONE = range(5)


class Block:
    """Device memory that is away for a while.

    Attributes:
        holders: how many saved tensors want it back.
        spoilt: written to in place while it was saved and before its copy was surely done.
        buffer: on the device; None while it is on the host alone.
    """

    __slots__ = (
        "arrival",
        "buffer",
        "departure",
        "holders",
        "name",
        "nbytes",
        "offset",
        "spoilt",
        "where",
    )

    def __init__(self, buffer: Buffer, offset: int, departure: Fence) -> None:
        self.buffer: Buffer | None = buffer
        self.departure, self.arrival = departure, departure  # behind its copies out and in
        self.name, self.nbytes, self.offset = buffer.name, buffer.nbytes, offset
        self.where = LEAVING
        self.holders = 0
        self.spoilt = False

    @property
    def gone(self) -> bool:
        """Nobody wanted it any more, and it is nowhere."""
        return self.where == GONE


class Part:
    """A segment's blocks, or those of one piece of it where others lie within it."""

    __slots__ = ("blocks", "index", "name", "used")

    def __init__(self, index: int, name: str) -> None:
        self.index, self.name = index, name
        self.blocks: dict[Block, None] = {}  # in the order they were made
        self.used = False  # whether its backward pass has begun

    def is_wanted(self) -> bool:
        """Whether any of its blocks is."""
        for block in self.blocks:  # noqa: SIM110  (half the time of any)
            if block.holders:
                return True
        return False


@dataclass
class Statistics:
    """Of all steps since the scheduler was made.

    Attributes:
        bytes_out, bytes_back: copied to the host and back.
        stayed_bytes: that were to go and stayed, since the slab was full.
        peak_host_bytes: most of the slab in use at once.
        stall_seconds: how long the computation waited for copies: in virtual time, or measured by
            events on CUDA.
    """

    bytes_out: int = 0
    bytes_back: int = 0
    stayed_bytes: int = 0
    peak_host_bytes: int = 0
    stall_seconds: float = 0.0


@dataclass
class Scheduler:
    """Drives one backend's copies; see the module.

    Args:
        backend: whose streams and memory.
        slab_bytes: of the one allocation in host memory.
        window: how many segments ahead of the backward pass are copied in.
        stash: how many segments of the forward pass may wait for the end of their copies before
            the computation has to.
    """

    backend: Backend
    slab_bytes: int
    window: int = 1
    stash: int = 1
    counted: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        for name, least in (("slab_bytes", 0), ("window", 0), ("stash", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        self.slab = Slab(self.slab_bytes)
        self.memory = self.backend.host(self.slab.nbytes)
        self.parts: list[Part] = []  # that still have blocks, in the order of their making
        self._made = 0
        self._open: list[Part] = []
        self._leaving: deque[Part] = deque()  # whose blocks are copied out and still held
        self._dropped: deque[Block] = deque()
        #: While it is set, `let_go` only makes a note: a garbage collector may call it anywhere.
        self._inside = False
        self._copies = 0  # numbers them
        self._waited = [0, 0, 0]  # for each stream: up to which of its copies the computation did

    # --- forward ---

    def open(self, name: str) -> None:
        """Begin a segment. Inside another one, that one ends here and begins anew at `close`."""
        if self._dropped:
            self._settle()
        self._inside = True
        try:
            if self._open:
                self._end(self._open[-1])
            self._begin(name)
        finally:
            self._inside = False

    def close(self) -> None:
        """End the segment that was opened last."""
        self._inside = True
        try:
            self._end(self._open.pop())
            if self._open:
                self._begin(self._open.pop().name)
        finally:
            self._inside = False

    def _begin(self, name: str) -> None:
        self._made += 1
        self._open.append(Part(self._made, name))

    @property
    def is_idle(self) -> bool:
        """Whether nothing is away and no segment open."""
        return not self.parts and not self._open

    @property
    def part(self) -> Part:
        """The one that is open."""
        return self._open[-1]

    def send(self, nbytes: int, tensor: Tensor | None = None, name: str = "") -> Block | None:
        """Copy memory that the computation made to the host: for the open segment.

        Returns:
            None where the slab is full: the memory stays, and that is counted.
        """
        if self._dropped:
            self._settle()
        self._inside = True
        try:
            block = self._send(nbytes, tensor, name)
        finally:
            self._inside = False
        if block is None:
            self.counted.stayed_bytes += nbytes
            return None
        self.counted.bytes_out += nbytes
        self.hold(block)
        return block

    def _send(self, nbytes: int, tensor: Tensor | None, name: str) -> Block | None:
        place = self.slab.take(nbytes)
        if place is None:
            return None
        backend = self.backend
        offset, fence = place
        if fence is not None:  # what came from there may still be on its way
            backend.wait(OUT, fence[1])
        buffer = backend.adopt(nbytes, tensor, name)
        backend.wait(OUT, backend.record(COMPUTE))
        backend.copy_out(buffer, self.memory, offset)
        return Block(buffer, offset, self._fence(OUT))

    def hold(self, block: Block) -> None:
        """One more saved tensor, of the open segment, wants the block."""
        block.holders += 1
        self._open[-1].blocks[block] = None

    def flush(self) -> None:
        """Let go of the device memory of all that goes to the host, behind the copies."""
        if self._dropped:
            self._settle()
        self._inside = True
        try:
            while self._leaving:
                self._release(self._leaving.popleft())
        finally:
            self._inside = False

    def _end(self, part: Part) -> None:
        if part.is_wanted():  # its backward pass may have been run within it
            self.parts.append(part)
            self._leaving.append(part)
        while self._leaving and (len(self._leaving) > self.stash or self._left(self._leaving[0])):
            self._release(self._leaving.popleft())

    def _left(self, part: Part) -> bool:
        for block in reversed(part.blocks):
            if block.where == LEAVING:  # the copies before it have then ended, too
                return self.backend.done(block.departure[1])
        return True

    def _release(self, part: Part) -> None:
        for block in reversed(part.blocks):  # having waited for the last, one has for all
            if block.where == LEAVING:
                assert block.buffer is not None
                block.spoilt = block.buffer.changed
                self._let_buffer_go(block)
                block.where = HOST

    def _let_buffer_go(self, block: Block) -> None:
        """Nothing else may have the memory before all copies that touch it have ended."""
        assert block.buffer is not None
        self._await(OUT, block.departure)
        self.backend.drop(block.buffer)
        block.buffer = None

    # --- backward ---

    def need(self, block: Block, part: Part) -> Buffer:
        """The block on the device, for the backward pass of the segment ``part``, which has begun.

        The computation is made to wait for it; the segments before it begin to come back.

        Raises:
            OffloadError: the scheduler was reset in between, or the values have been overwritten.
        """
        if self._dropped:
            self._settle()
        if block.where == GONE:
            raise OffloadError(
                f"{block.name or 'A saved tensor'} was forgotten when the offloading was reset; "
                "its backward pass cannot run any more."
            )
        self._inside = True
        try:
            if block.where == HOST:
                self._fetch(part)
            if block.where == LEAVING:
                self._stay(block)
            elif block.where == COMING:
                self._arrive(block)
            if not part.used:
                part.used = True
                self._prefetch(part)
        finally:
            self._inside = False
        assert block.buffer is not None
        if block.spoilt or block.buffer.changed:
            raise OffloadError(
                f"{block.name or 'A saved tensor'} is needed for gradients and was modified in "
                "place after it had been saved."
            )
        self.backend.use(block.buffer)
        return block.buffer

    def _stay(self, block: Block) -> None:
        """It never left. The copy is of no use; whatever comes to its place is queued behind it."""
        block.where = HERE
        self.slab.give_back(block.offset, block.nbytes)

    def _arrive(self, block: Block) -> None:
        self._await(BACK, block.arrival)
        block.where = HERE

    def _fence(self, stream: int) -> Fence:
        self._copies += 1
        return self._copies, self.backend.record(stream)

    def _await(self, stream: int, fence: Fence) -> None:
        """Let the computation wait for a copy; once is enough for it and all before it."""
        number, event = fence
        if number > self._waited[stream]:
            self._waited[stream] = number
            self.backend.wait(COMPUTE, event)

    def _prefetch(self, part: Part) -> None:
        wanted = self.window
        for earlier in reversed(self.parts):
            if wanted <= 0:
                return
            if earlier.index < part.index and not earlier.used:
                self._fetch(earlier)
                wanted -= 1

    def _fetch(self, part: Part) -> None:
        blocks = [b for b in part.blocks if b.where == HOST and b.holders]
        if not blocks:
            return
        backend = self.backend
        buffers = [backend.allocate(block.nbytes, block.name) for block in blocks]
        # what had this memory before is queued on the computation's stream
        backend.wait(BACK, backend.record(COMPUTE))
        for block, buffer in zip(blocks, buffers, strict=True):
            backend.copy_in(self.memory, block.offset, buffer)
            self.counted.bytes_back += block.nbytes
        arrival = self._fence(BACK)
        for block, buffer in zip(blocks, buffers, strict=True):
            block.where, block.buffer, block.arrival = COMING, buffer, arrival
            self.slab.give_back(block.offset, block.nbytes, arrival)

    # --- the end of a block ---

    def let_go(self, block: Block) -> None:
        """A saved tensor does not want the block any more. May be called at any time."""
        block.holders -= 1
        if block.holders == 0:
            self._dropped.append(block)
            if not self._inside:
                self._settle()

    def reset(self) -> None:
        """Forget everything: for after an exception, or a step whose backward pass never runs.

        Graphs that are still there cannot run backward any more.
        """
        self._inside = True
        try:
            for part in (*self.parts, *self._open):
                for block in part.blocks:
                    if not block.gone:
                        self._forget(block)
                part.blocks = {}
            self.parts = []
            self._leaving.clear()
            self._dropped.clear()
        finally:
            self._inside = False

    def _settle(self) -> None:
        """Give back the memory of blocks that nobody wants."""
        if not self._dropped or self._inside:
            return
        self._inside = True
        try:
            while self._dropped:
                block = self._dropped.popleft()
                if not block.holders and not block.gone:
                    self._forget(block)
        finally:
            self._inside = False
        while self.parts and not self.parts[-1].is_wanted():
            self.parts.pop()

    def _forget(self, block: Block) -> None:
        if block.where == COMING:
            self._arrive(block)
        elif block.where == LEAVING:
            self._stay(block)
        elif block.where == HOST:
            self.slab.give_back(block.offset, block.nbytes)
        if block.buffer is not None:
            self._let_buffer_go(block)
        block.where = GONE
