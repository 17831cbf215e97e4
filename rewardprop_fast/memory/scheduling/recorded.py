"""A backend that writes down, in a graph, what another one is asked for.

The graph grows as long as it runs: for looking at a step and for tests, not for training.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rewardprop_fast.memory.scheduling.backend import (
    BACK,
    COMPUTE,
    OUT,
    Backend,
    Buffer,
    Event,
    Host,
)
from rewardprop_fast.memory.scheduling.graph import (
    ALLOCATION,
    COMPUTATION,
    COPY_IN,
    COPY_OUT,
    FREE,
    EventGraph,
    Extent,
    Node,
)


class _Recorded(NamedTuple):
    """Another backend's event, and the last node before it."""

    event: Event
    node: int | None


class Recorded:
    """A `Backend` around another.

    Attributes:
        graph: of all that was asked for.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.graph = EventGraph()
        self._last: list[int | None] = [None, None, None]  # node of each stream
        self._awaited: list[set[int]] = [set(), set(), set()]  # by the next node of each stream
        self._names: dict[Buffer | Host, str] = {}

    def compute(self, seconds: float) -> None:
        """For backends in virtual time."""
        self.backend.compute(seconds)  # type: ignore[attr-defined]
        self._node(COMPUTATION, COMPUTE, f"{seconds:g} s")

    def host(self, nbytes: int) -> Host:
        host = self.backend.host(nbytes)
        self._name(host, "host")
        return host

    def takes(self, tensor: Tensor) -> bool:
        return self.backend.takes(tensor)

    def adopt(self, nbytes: int, tensor: Tensor | None = None, name: str = "") -> Buffer:
        buffer = self.backend.adopt(nbytes, tensor, name)
        self._name(buffer, "buffer")
        self._node(COMPUTATION, COMPUTE, f"makes {name}", writes=(self._all(buffer),))
        return buffer

    def allocate(self, nbytes: int, name: str = "") -> Buffer:
        buffer = self.backend.allocate(nbytes, name)
        self._name(buffer, "buffer")
        self._node(ALLOCATION, COMPUTE, name, writes=(self._all(buffer),))
        return buffer

    def drop(self, buffer: Buffer) -> None:
        self._node(FREE, COMPUTE, buffer.name, writes=(self._all(buffer),))
        self.backend.drop(buffer)

    def copy_out(self, buffer: Buffer, host: Host, offset: int) -> None:
        place = Extent(self._names[host], offset, offset + buffer.nbytes)
        self._node(COPY_OUT, OUT, buffer.name, (self._all(buffer),), (place,))
        self.backend.copy_out(buffer, host, offset)

    def copy_in(self, host: Host, offset: int, buffer: Buffer) -> None:
        place = Extent(self._names[host], offset, offset + buffer.nbytes)
        self._node(COPY_IN, BACK, buffer.name, (place,), (self._all(buffer),))
        self.backend.copy_in(host, offset, buffer)

    def filled(self, host: Host, offset: int, nbytes: int) -> None:
        place = Extent(self._names[host], offset, offset + nbytes)
        node = self._node(COMPUTATION, COMPUTE, "the host writes", writes=(place,))
        for awaited in self._awaited:
            awaited.add(node.index)
        self.backend.filled(host, offset, nbytes)

    def use(self, buffer: Buffer) -> None:
        self._node(COMPUTATION, COMPUTE, f"uses {buffer.name}", (self._all(buffer),))
        self.backend.use(buffer)

    def record(self, stream: int) -> Event:
        # behind what the stream waits for, too, though nothing was queued behind that yet
        if self._awaited[stream]:
            self._node(COMPUTATION, stream, "event")
        return _Recorded(self.backend.record(stream), self._last[stream])

    def wait(self, stream: int, event: Event) -> None:
        if event.node is not None:
            self._awaited[stream].add(event.node)
        self.backend.wait(stream, event.event)

    def done(self, event: Event) -> bool:
        if not self.backend.done(event.event):
            return False
        self._host_knows(event)
        return True

    def synchronize(self, event: Event) -> None:
        self.backend.synchronize(event.event)
        self._host_knows(event)

    def _host_knows(self, event: _Recorded) -> None:
        if event.node is not None:
            for awaited in self._awaited:  # what is queued from now on is behind it
                awaited.add(event.node)

    @property
    def stall_seconds(self) -> float:
        return self.backend.stall_seconds

    def _node(
        self,
        kind: str,
        stream: int,
        name: str,
        reads: tuple[Extent, ...] = (),
        writes: tuple[Extent, ...] = (),
    ) -> Node:
        behind, self._awaited[stream] = self._awaited[stream], set()
        last = self._last[stream]
        if last is not None:
            behind.add(last)
        node = self.graph.add(kind, stream, name, behind, reads, writes)
        self._last[stream] = node.index
        return node

    def _name(self, memory: Buffer | Host, kind: str) -> None:
        self._names[memory] = f"{kind} {len(self._names)}"

    def _all(self, buffer: Buffer) -> Extent:
        return Extent(self._names[buffer], 0, buffer.nbytes)
