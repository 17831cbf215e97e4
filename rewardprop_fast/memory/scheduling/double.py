"""A strict double of a device on the CPU: two arenas, virtual streams, and nothing forgiven.

Copies really copy, at the moment when somebody is ordered behind them: until then their
destination holds NaN. Each stream knows how much of every stream it is ordered behind (a vector
clock), which is what an event carries from one to the other; an access that is not ordered behind
those it must follow is an error even where the virtual times would have let it pass.

Buffers are ordinary CPU tensors. What the computation allocates for itself is not seen: the device
arena holds what the scheduler holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rewardprop_fast.memory.scheduling.backend import (
    BACK,
    COMPUTE,
    OUT,
    STREAMS,
    Buffer,
    Event,
    Host,
    as_bytes,
)
from rewardprop_fast.memory.scheduling.virtual import VirtualDevice
from rewardprop_fast.memory.sizes import format_bytes

#: All bits set: NaN in every floating-point format.
POISON = 0xFF


class ScheduleError(RuntimeError):
    """A scheduler did what would go wrong on a device, at least now and then."""


class UseBeforeArrival(ScheduleError):
    """Read before the copy that writes it has ended, or without any."""


class UseAfterFree(ScheduleError):
    """Touched after it was let go of, or let go of while a copy touches it."""


class MissingEvent(ScheduleError):
    """In time by luck: nothing orders the access behind the one it must follow."""


class BudgetOverrun(ScheduleError):
    """More bytes than an arena has."""


class VirtualEvent(NamedTuple):
    """When a stream reaches it, and how many operations of each stream are then done."""

    time: float
    known: tuple[int, int, int]


class Access(NamedTuple):
    """The ``number``-th operation of a stream; ends at ``time``."""

    stream: int
    number: int
    time: float


@dataclass
class _Touched:
    """A buffer's last write and the reads since."""

    write: Access
    filled: bool  # false for memory that was allocated and not written yet
    reads: list[Access] = field(default_factory=list)


@dataclass
class _Place:
    """Bytes [begin, end) of host memory: the last write, and the reads since."""

    begin: int
    end: int
    write: Access
    reads: list[Access] = field(default_factory=list)


class Double(VirtualDevice):
    """See the module.

    Args:
        host_bytes, device_bytes: what the arenas hold.
        to_host_bandwidth, to_device_bandwidth: bytes/s.
        values: False copies nothing, so that tensors may be fake.
        lockstep: whether the host is where the computation is, and so sees copies finish. A host
            that queues ahead of the device sees nothing finish, which is the harder case.

    Attributes:
        host_bytes_now: allocated.
        violations: all that were found: an error raised in a destructor goes no further.
    """

    def __init__(
        self,
        host_bytes: int,
        device_bytes: int,
        to_host_bandwidth: float,
        to_device_bandwidth: float,
        *,
        values: bool = True,
        lockstep: bool = False,
    ) -> None:
        super().__init__(to_host_bandwidth, to_device_bandwidth)
        self.host_bytes, self.device_bytes = host_bytes, device_bytes
        self.values, self.lockstep = values, lockstep
        self.host_bytes_now = 0
        self.violations: list[ScheduleError] = []
        self._known = [[0, 0, 0], [0, 0, 0], [0, 0, 0]]
        self._pending: list[tuple[Access, Callable[[], None]]] = []
        self._touched: dict[Buffer, _Touched] = {}  # of the buffers that are held
        self._places: dict[Host, list[_Place]] = {}

    # --- arenas ---

    def host(self, nbytes: int) -> Host:
        self.host_bytes_now += nbytes
        if self.host_bytes_now > self.host_bytes:
            raise self._violation(
                BudgetOverrun, _overrun("host", self.host_bytes_now, self.host_bytes)
            )
        tensor = torch.empty(nbytes, dtype=torch.uint8) if self.values else None
        host = Host(nbytes, tensor)
        self._places[host] = []
        return host

    def takes(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def adopt(self, nbytes: int, tensor: Tensor | None = None, name: str = "") -> Buffer:
        buffer = super().adopt(nbytes, tensor, name)
        self._touched[buffer] = _Touched(self._operation(COMPUTE), filled=True)
        return buffer

    def allocate(self, nbytes: int, name: str = "") -> Buffer:
        buffer = super().allocate(nbytes, name)
        buffer.tensor = torch.empty(nbytes, dtype=torch.uint8)
        if self.values:
            buffer.tensor.fill_(POISON)
        # whatever the computation did with this memory before
        self._touched[buffer] = _Touched(self._operation(COMPUTE), filled=False)
        return buffer

    def _hold(self, nbytes: int) -> None:
        super()._hold(nbytes)
        if self.device_bytes_now > self.device_bytes:
            raise self._violation(
                BudgetOverrun, _overrun("device", self.device_bytes_now, self.device_bytes)
            )

    def drop(self, buffer: Buffer) -> None:
        touched = self._held(buffer)
        for access in (touched.write, *touched.reads):
            if not self._follows(COMPUTE, access):
                raise self._violation(
                    UseAfterFree,
                    f"{_title(buffer)} was let go of while the stream {STREAMS[access.stream]!r} "
                    "may still touch it: the computation's next tensor may get this memory.",
                )
        del self._touched[buffer]
        super().drop(buffer)
        buffer.tensor = None

    # --- work ---

    def compute(self, seconds: float) -> None:
        super().compute(seconds)
        self._operation(COMPUTE)

    def copy_out(self, buffer: Buffer, host: Host, offset: int) -> None:
        touched = self._held(buffer)
        if not touched.filled:
            raise self._violation(
                UseBeforeArrival, f"{_title(buffer)} is copied to the host, but holds nothing."
            )
        self._must_follow(OUT, touched.write, f"{_title(buffer)} is copied to the host", "written")
        super().copy_out(buffer, host, offset)
        access = self._operation(OUT)
        touched.reads.append(access)
        self._write_place(host, offset, buffer.nbytes, access, _title(buffer))
        if self.values and host.tensor is not None and buffer.tensor is not None:
            to = host.tensor[offset : offset + buffer.nbytes]
            source = as_bytes(buffer.tensor)
            self._pending.append((access, self._late_copy(source, to, _title(buffer))))

    def copy_in(self, host: Host, offset: int, buffer: Buffer) -> None:
        touched = self._held(buffer)
        for access in (touched.write, *touched.reads):
            self._must_follow(BACK, access, f"{_title(buffer)} is overwritten", "used")
        place = self._written_place(host, offset, buffer)
        self._must_follow(BACK, place.write, f"{_title(buffer)} comes back", "copied to the host")
        super().copy_in(host, offset, buffer)
        access = self._operation(BACK)
        place.reads.append(access)
        touched.write, touched.filled, touched.reads = access, True, []
        if self.values and host.tensor is not None and buffer.tensor is not None:
            source = host.tensor[offset : offset + buffer.nbytes]
            self._pending.append((access, self._late_copy(source, buffer.tensor, _title(buffer))))

    def filled(self, host: Host, offset: int, nbytes: int) -> None:
        # the 0th operation of any stream is behind everything
        self._write_place(host, offset, nbytes, Access(COMPUTE, 0, 0.0), "What the host writes")

    def use(self, buffer: Buffer) -> None:
        touched = self._held(buffer)
        if not touched.filled:
            raise self._violation(
                UseBeforeArrival, f"{_title(buffer)} is used, but nothing was copied to it."
            )
        self._must_follow(COMPUTE, touched.write, f"{_title(buffer)} is used", "copied back")
        touched.reads.append(self._operation(COMPUTE))

    # --- order ---

    def record(self, stream: int) -> Event:
        known = self._known[stream]
        return VirtualEvent(self.ready[stream], (known[0], known[1], known[2]))

    def wait(self, stream: int, event: Event) -> None:
        super().wait(stream, event.time)
        self._learn(stream, event.known)

    def done(self, event: Event) -> bool:
        if self.lockstep and event.time <= self.ready[COMPUTE]:
            for stream in (COMPUTE, OUT, BACK):  # what the host queues from now on is behind it
                self._learn(stream, event.known)
            return True
        return False

    def synchronize(self, event: Event) -> None:
        for stream in (COMPUTE, OUT, BACK):
            self.ready[stream] = max(self.ready[stream], event.time)
            self._learn(stream, event.known)

    def _learn(self, stream: int, known: tuple[int, int, int]) -> None:
        own = self._known[stream]
        own[:] = [max(a, b) for a, b in zip(own, known, strict=True)]
        passed = [entry for entry in self._pending if self._follows(stream, entry[0])]
        if passed:
            self._pending = [e for e in self._pending if not self._follows(stream, e[0])]
            for _, copy in passed:
                copy()

    def _operation(self, stream: int) -> Access:
        known = self._known[stream]
        known[stream] += 1
        return Access(stream, known[stream], self.ready[stream])

    def _follows(self, stream: int, access: Access) -> bool:
        return self._known[stream][access.stream] >= access.number

    def _must_follow(self, stream: int, access: Access, what: str, before: str) -> None:
        if self._follows(stream, access):
            return
        where = f"on the stream {STREAMS[access.stream]!r}"
        if access.time > self.ready[stream]:
            raise self._violation(
                UseBeforeArrival,
                f"{what} at {self.ready[stream]:.6f} s, and is {before} {where} only at "
                f"{access.time:.6f} s.",
            )
        raise self._violation(
            MissingEvent,
            f"{what} on the stream {STREAMS[stream]!r}, which does not wait until it is {before} "
            f"{where}; here it was in time by luck.",
        )

    def _late_copy(self, source: Tensor, to: Tensor, title: str) -> Callable[[], None]:
        """The copy, to be done later; the destination is poisoned until then.

        A copy engine reads at any time before the end, so the source must not change until then.
        """
        before = source.clone()
        to.fill_(POISON)

        def copy() -> None:
            if not torch.equal(source, before):
                raise self._violation(ScheduleError, f"{title} was written to while it was copied.")
            to.copy_(source)

        return copy

    def _violation(self, kind: type[ScheduleError], message: str) -> ScheduleError:
        self.violations.append(kind(message))
        return self.violations[-1]

    # --- places ---

    def _held(self, buffer: Buffer) -> _Touched:
        touched = self._touched.get(buffer)
        if touched is None:
            raise self._violation(
                UseAfterFree, f"{_title(buffer)} is touched after it was let go of."
            )
        return touched

    def _write_place(
        self, host: Host, offset: int, nbytes: int, access: Access, title: str
    ) -> None:
        end = offset + nbytes
        if offset < 0 or end > host.nbytes:
            raise self._violation(BudgetOverrun, f"{title} does not lie within the host memory.")
        others = []
        for place in self._places[host]:
            if place.begin >= end or place.end <= offset:
                others.append(place)
                continue
            for before in (place.write, *place.reads):
                self._must_follow(access.stream, before, f"{title} takes a place that", "used")
        self._places[host] = [*others, _Place(offset, end, access)]

    def _written_place(self, host: Host, offset: int, buffer: Buffer) -> _Place:
        for place in self._places[host]:
            if (place.begin, place.end) == (offset, offset + buffer.nbytes):
                return place
        raise self._violation(
            UseAfterFree,
            f"{_title(buffer)} comes back from a place of the host memory that does not hold it "
            "(any more).",
        )


def _title(buffer: Buffer) -> str:
    return f"{buffer.name or 'A block'} ({format_bytes(buffer.nbytes)})"


def _overrun(arena: str, nbytes: int, limit: int) -> str:
    return f"The {arena} arena holds {format_bytes(limit)}; {format_bytes(nbytes)} are in use."
