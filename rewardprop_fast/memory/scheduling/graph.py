"""What was queued, as a graph: which operation runs behind which, and whether that is enough.

It is made from what a backend was asked for, not from what a scheduler meant to ask for: an edge is
the order of a stream, or an event recorded on one and waited for on another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from rewardprop_fast.memory.scheduling.backend import STREAMS

COMPUTATION, COPY_OUT, COPY_IN = "compute", "copy out", "copy in"
ALLOCATION, FREE = "allocate", "free"


class GraphError(RuntimeError):
    """A graph that would go wrong, at least now and then."""


class Extent(NamedTuple):
    """Bytes [begin, end) of a memory: a buffer on the device, or one of host memory."""

    memory: str
    begin: int
    end: int

    def meets(self, other: Extent) -> bool:
        """Whether they have bytes in common."""
        return self.memory == other.memory and self.begin < other.end and other.begin < self.end


@dataclass
class Node:
    """One operation.

    Attributes:
        kind: `COMPUTATION`, `COPY_OUT`, `COPY_IN`, `ALLOCATION` or `FREE`. The last two are the
            computation's: what it did with the memory before lies before the allocation, what it
            does with it next behind the free.
        stream: index into `STREAMS`.
        behind: the nodes it waits for, directly.
        reads, writes: the memory it touches; what is allocated or freed counts as written.
    """

    index: int
    kind: str
    stream: int
    name: str = ""
    behind: set[int] = field(default_factory=set)
    reads: tuple[Extent, ...] = ()
    writes: tuple[Extent, ...] = ()

    def __str__(self) -> str:
        behind = ", ".join(map(str, sorted(self.behind))) or "nothing"
        return (
            f"{self.index:5} {STREAMS[self.stream]:8} {self.kind:9} behind {behind:14} {self.name}"
        )


@dataclass
class EventGraph:
    """Nodes in the order they were queued. ``print(graph)`` shows them, a line each."""

    nodes: list[Node] = field(default_factory=list)

    def add(
        self,
        kind: str,
        stream: int,
        name: str = "",
        behind: Iterable[int] = (),
        reads: tuple[Extent, ...] = (),
        writes: tuple[Extent, ...] = (),
    ) -> Node:
        """Append a node."""
        node = Node(len(self.nodes), kind, stream, name, set(behind), reads, writes)
        self.nodes.append(node)
        return node

    def __str__(self) -> str:
        return "\n".join(map(str, self.nodes))

    def check(self) -> None:
        """Find the first access that could come too early.

        Raises:
            GraphError: there is a circle; something is read that nothing wrote, or not surely after
                it was written; something is overwritten or freed before it was surely used for the
                last time; or it is touched when it is free.
        """
        before = self._before()
        touched: list[tuple[Node, Extent, bool]] = []
        for node in self.nodes:
            for extent in node.reads:
                self._check_read(node, extent, touched, before)
            for extent in node.writes:
                self._check_write(node, extent, touched, before)
            touched += [(node, extent, False) for extent in node.reads]
            touched += [(node, extent, True) for extent in node.writes]

    def _check_read(
        self,
        node: Node,
        extent: Extent,
        touched: list[tuple[Node, Extent, bool]],
        before: list[int],
    ) -> None:
        for other, theirs, writes in reversed(touched):
            if writes and theirs.meets(extent):
                if other.kind == FREE:
                    raise GraphError(f"It is read when it is free:\n{other}\n{node}")
                if other.kind == ALLOCATION:
                    break
                if not before[node.index] >> other.index & 1:
                    raise GraphError(f"It may be read before it is written:\n{other}\n{node}")
                return
        raise GraphError(f"It reads what nothing wrote:\n{node}")

    def _check_write(
        self,
        node: Node,
        extent: Extent,
        touched: list[tuple[Node, Extent, bool]],
        before: list[int],
    ) -> None:
        what = "freed" if node.kind == FREE else "overwritten"
        for other, theirs, _ in touched:
            if not theirs.meets(extent):
                continue
            if other.kind == FREE:
                raise GraphError(f"It is {what} when it is free:\n{other}\n{node}")
            if not before[node.index] >> other.index & 1:
                raise GraphError(f"It may be {what} while it is in use:\n{other}\n{node}")

    def _before(self) -> list[int]:
        """For every node those that are surely done when it begins, as bits."""
        before = [0] * len(self.nodes)
        for index in self._ordered():
            for other in self.nodes[index].behind:
                before[index] |= before[other] | 1 << other
        return before

    def _ordered(self) -> Iterator[int]:
        """All nodes, each after those it waits for."""
        waiting = [len(node.behind) for node in self.nodes]
        followers: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for other in node.behind:
                followers[other].append(node.index)
        ready = [index for index, count in enumerate(waiting) if not count]
        done = 0
        while ready:
            index = ready.pop()
            done += 1
            yield index
            for follower in followers[index]:
                waiting[follower] -= 1
                if not waiting[follower]:
                    ready.append(follower)
        if done < len(self.nodes):
            stuck = next(node for node in self.nodes if waiting[node.index])
            raise GraphError(f"Operations wait for each other in a circle, among them:\n{stuck}")
