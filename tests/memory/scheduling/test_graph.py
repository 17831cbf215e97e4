"""Graphs made by hand, right and wrong."""

from __future__ import annotations

import pytest

from rewardprop_fast.memory.scheduling.backend import BACK, COMPUTE, OUT
from rewardprop_fast.memory.scheduling.graph import (
    ALLOCATION,
    COMPUTATION,
    COPY_IN,
    COPY_OUT,
    FREE,
    EventGraph,
    Extent,
    GraphError,
)
from rewardprop_fast.memory.scheduling.recorded import Recorded
from rewardprop_fast.memory.scheduling.scheduler import Scheduler
from rewardprop_fast.memory.scheduling.virtual import VirtualDevice

DEVICE, AGAIN = Extent("buffer", 0, 8), Extent("another", 0, 8)
PLACE = Extent("host", 16, 24)


def round_trip() -> EventGraph:
    """One block out and back."""
    graph = EventGraph()
    graph.add(COMPUTATION, COMPUTE, "makes", writes=(DEVICE,))
    graph.add(COPY_OUT, OUT, behind=[0], reads=(DEVICE,), writes=(PLACE,))
    graph.add(FREE, COMPUTE, behind=[0, 1], writes=(DEVICE,))
    graph.add(ALLOCATION, COMPUTE, behind=[2], writes=(AGAIN,))
    graph.add(COPY_IN, BACK, behind=[3], reads=(PLACE,), writes=(AGAIN,))
    graph.add(COMPUTATION, COMPUTE, "uses", behind=[3, 4], reads=(AGAIN,))
    graph.add(FREE, COMPUTE, behind=[5], writes=(AGAIN,))
    return graph


def test_a_round_trip_is_right() -> None:
    round_trip().check()
    EventGraph().check()


@pytest.mark.parametrize(
    ("node", "edge", "message"),
    [
        (1, 0, "may be read before it is written"),
        (2, 1, "may be freed while it is in use"),
        (4, 3, "may be read before it is written"),  # what orders 4 behind 1 as well
        (5, 4, "may be read before it is written"),
        (6, 5, "may be freed while it is in use"),
    ],
)
def test_every_edge_is_needed(node: int, edge: int, message: str) -> None:
    graph = round_trip()
    graph.nodes[node].behind.discard(edge)
    with pytest.raises(GraphError, match=message):
        graph.check()


def test_a_circle() -> None:
    graph = round_trip()
    graph.nodes[1].behind.add(5)
    with pytest.raises(GraphError, match="in a circle"):
        graph.check()


def test_what_was_never_written() -> None:
    graph = EventGraph()
    graph.add(ALLOCATION, COMPUTE, writes=(DEVICE,))
    graph.add(COMPUTATION, COMPUTE, "uses", behind=[0], reads=(DEVICE,))
    with pytest.raises(GraphError, match="nothing wrote"):
        graph.check()
    graph = EventGraph()
    graph.add(COPY_IN, BACK, reads=(PLACE,), writes=(DEVICE,))
    with pytest.raises(GraphError, match="nothing wrote"):
        graph.check()


def test_what_is_free_is_not_touched() -> None:
    graph = round_trip()
    graph.add(COMPUTATION, COMPUTE, behind=[6], reads=(DEVICE,))
    with pytest.raises(GraphError, match="read when it is free"):
        graph.check()
    graph = round_trip()
    graph.add(FREE, COMPUTE, behind=[6], writes=(AGAIN,))
    with pytest.raises(GraphError, match="freed when it is free"):
        graph.check()


def test_a_place_is_not_overwritten_while_it_is_read() -> None:
    graph = round_trip()
    overlapping = Extent("host", 23, 30)
    graph.add(COMPUTATION, COMPUTE, behind=[6], writes=(DEVICE._replace(memory="third"),))
    third = graph.nodes[-1].writes
    node = graph.add(COPY_OUT, OUT, behind=[1, 7], reads=third, writes=(overlapping,))
    graph.check()  # behind 7, which is behind the use of what was read there
    graph.nodes[7].behind = {0}
    with pytest.raises(GraphError, match="may be overwritten while it is in use"):
        graph.check()
    node.writes = (Extent("host", 24, 30),)
    graph.check()


def test_it_can_be_read_by_people() -> None:
    device = Recorded(VirtualDevice(1e9, 1e9))
    scheduler = Scheduler(device, 4096, stash=0)
    scheduler.open("block")
    device.compute(1.0)
    block, part = scheduler.send(100, name="hidden"), scheduler.part
    scheduler.close()
    assert block is not None
    scheduler.need(block, part)
    scheduler.let_go(block)
    device.graph.check()
    lines = [line.split() for line in str(device.graph).splitlines()]
    assert [line[0] for line in lines] == [str(number) for number in range(len(lines))]
    assert [line[1:3] for line in lines] == [
        ["compute", "compute"],
        ["compute", "compute"],
        ["out", "copy"],
        ["compute", "free"],
        ["compute", "allocate"],
        ["back", "copy"],
        ["compute", "compute"],
        ["compute", "free"],
    ]
    assert "behind 3, 4" not in str(device.graph)
    assert lines[5][2:] == ["copy", "in", "behind", "4", "hidden"]
    assert lines[6][3:] == ["behind", "4,", "5", "uses", "hidden"]
