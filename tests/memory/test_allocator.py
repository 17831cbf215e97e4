"""The caching allocator's rules: by hand, against a naive form of them, and what always holds."""

from __future__ import annotations

import itertools
import time
from collections import deque
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardprop_fast.memory import MemoryTracker
from rewardprop_fast.memory.allocator import Allocator, Event, Reserved, replay, rounded

KIB, MIB = 2**10, 2**20
MODES = pytest.mark.parametrize("expandable", [False, True])


def births(*sizes: int) -> list[Event]:
    return list(enumerate(sizes))


# --- by hand ---


@pytest.mark.parametrize(
    ("nbytes", "size"),
    [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)],
)
def test_sizes_are_rounded_to_512(nbytes: int, size: int) -> None:
    assert rounded(nbytes) == size


@pytest.mark.parametrize(
    ("sizes", "reserved", "allocated"),
    [
        ((1,), 2 * MIB, 512),
        ((MIB,), 2 * MIB, MIB),
        ((MIB, MIB), 2 * MIB, 2 * MIB),
        ((MIB, MIB, 1), 4 * MIB, 2 * MIB + 512),
        ((MIB + 1,), 20 * MIB, MIB + 512),
        ((10 * MIB - 512,), 20 * MIB, 10 * MIB - 512),
        ((10 * MIB - 512, 10 * MIB - 512), 20 * MIB, 20 * MIB),  # 1024 left: not cut off
        ((10 * MIB,), 10 * MIB, 10 * MIB),
        ((10 * MIB + 1,), 12 * MIB, 10 * MIB + 512),
        ((11 * MIB,), 12 * MIB, 12 * MIB),  # 1 MiB is left: not more, so it stays
        ((11 * MIB - 512,), 12 * MIB, 11 * MIB - 512),
        ((30 * MIB, 512), 32 * MIB, 30 * MIB + 512),
        ((0, 0), 0, 0),
    ],
)
def test_segments(sizes: tuple[int, ...], reserved: int, allocated: int) -> None:
    found = replay(births(*sizes))
    assert (found.peak_reserved, found.peak_allocated) == (reserved, allocated)
    assert found.peak_rounded == sum(rounded(size) for size in sizes if size)


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ((1,), 2 * MIB),
        ((MIB, MIB, 1), 4 * MIB),
        ((MIB + 1,), 20 * MIB),
        ((30 * MIB,), 40 * MIB),
        ((30 * MIB, 10 * MIB), 40 * MIB),
        ((30 * MIB, 10 * MIB, 512), 42 * MIB),
        ((30 * MIB, 11 * MIB), 60 * MIB),
    ],
)
def test_pages_of_an_expandable_segment(sizes: tuple[int, ...], reserved: int) -> None:
    found = replay(births(*sizes), expandable_segments=True)
    assert found.peak_reserved == reserved
    assert found.peak_allocated == sum(map(rounded, sizes))  # all is cut off


def test_the_smallest_block_that_fits_is_taken() -> None:
    """Holes of 16 and 12 MiB: 11 MiB go into the second, 14 into the first; the order decides."""
    holes = [(0, 16 * MIB), (1, 12 * MIB), (0, -16 * MIB), (1, -12 * MIB)]
    kept = replay([*holes, (2, 11 * MIB), (3, 14 * MIB)])
    assert kept.peak_reserved == 28 * MIB
    wrong = replay([*holes, (2, 12 * MIB + 512), (3, 14 * MIB)])  # that takes the hole of 16
    assert wrong.peak_reserved == 42 * MIB


def test_of_equal_blocks_the_lowest_is_taken() -> None:
    allocator = Allocator()
    for which in (0, 1):
        allocator.allocate(which, 12 * MIB)
    addresses = [block.address for block in allocator.used()]
    for which in (1, 0):
        allocator.free(which)
    allocator.allocate(2, 12 * MIB)
    assert [block.address for block in allocator.used()] == [min(addresses)]


def test_neighbours_are_merged_segments_are_not() -> None:
    two = [(0, 9 * MIB), (1, 9 * MIB), (0, -9 * MIB), (1, -9 * MIB)]  # of one segment of 20
    assert replay([*two, (2, 20 * MIB)]).peak_reserved == 20 * MIB
    apart = [(0, 10 * MIB), (1, 10 * MIB), (0, -10 * MIB), (1, -10 * MIB)]
    assert replay([*apart, (2, 20 * MIB)]).peak_reserved == 40 * MIB
    merged = replay([*apart, (2, 20 * MIB)], expandable_segments=True)
    assert merged.peak_reserved == 20 * MIB


def test_the_pools_do_not_help_each_other() -> None:
    freed = [(0, 20 * MIB), (0, -20 * MIB)]
    assert replay([*freed, (1, 512)]).peak_reserved == 22 * MIB
    assert replay([*freed, (1, MIB + 1)]).peak_reserved == 20 * MIB


def test_fragmentation_is_what_lay_idle_when_most_was_handed_out() -> None:
    found = replay([(0, 100 * MIB), (0, -100 * MIB), (1, 150 * MIB), (2, 512)])
    assert found.peak_reserved == found.reserved_at_peak == 252 * MIB
    assert found.fragmentation == pytest.approx(1 - (150 * MIB + 512) / (252 * MIB))
    assert Reserved(0, 0, 0, 0).fragmentation == 0
    # More is reserved later, when less is handed out.
    later = replay([(0, 30 * MIB), (0, -30 * MIB), (1, 9 * MIB), (2, 32 * MIB), (2, -32 * MIB)])
    assert (later.peak_reserved, later.reserved_at_peak) == (62 * MIB, 62 * MIB)
    assert replay([(0, 40 * MIB), (0, -40 * MIB), (1, 512)]).reserved_at_peak == 40 * MIB


def test_idle_segments_are_given_back_when_the_driver_has_no_more() -> None:
    events = [(0, 12 * MIB), (1, 12 * MIB), (0, -12 * MIB), (2, 14 * MIB)]
    assert replay(events).peak_reserved == 38 * MIB
    assert replay(events, capacity=26 * MIB).peak_reserved == 26 * MIB
    assert replay(events, capacity=26 * MIB).out_of_memory_at is None
    tight = replay(events, capacity=26 * MIB - 1)
    assert tight.out_of_memory_at == 3
    assert tight.peak_allocated == 24 * MIB
    # A segment of which a part is used stays.
    stuck = [(0, 8 * MIB), (1, 8 * MIB), (0, -8 * MIB), (2, 10 * MIB)]
    assert replay(stuck, capacity=29 * MIB).out_of_memory_at == 3


def test_pages_within_a_free_block_are_given_back() -> None:
    """A page of 20 in use, one idle: the idle one moves to the end, behind 12 idle bytes there."""
    events = [(0, 20 * MIB), (1, 8 * MIB), (0, -20 * MIB), (2, 30 * MIB)]
    assert replay(events, expandable_segments=True).peak_reserved == 60 * MIB
    tight = replay(events, capacity=40 * MIB, expandable_segments=True)
    assert (tight.out_of_memory_at, tight.peak_reserved) == (None, 40 * MIB)
    assert replay(events, capacity=50 * MIB).out_of_memory_at is None
    assert replay(events, capacity=49 * MIB).out_of_memory_at == 3


def test_the_hole_is_filled_before_the_segment_grows() -> None:
    """Pages given back are found again, with the free block before them."""
    allocator = Allocator(60 * MIB, expandable_segments=True)
    for which in range(3):
        assert allocator.allocate(which, 20 * MIB)
    allocator.free(1)
    assert allocator.allocate(3, 2 * MIB - 512)  # in the hole
    allocator.free(3)
    assert allocator.allocate(4, 512)  # small pool: the large one has to give its page back
    assert allocator.reserved == 42 * MIB
    allocator.free(4)
    allocator.free(2)
    assert not allocator.allocate(5, 41 * MIB)  # gives back all that is idle, and is not enough
    assert allocator.reserved == 20 * MIB
    assert allocator.allocate(6, 40 * MIB)
    first, second = allocator.used()
    assert first.address + first.size == second.address


def test_a_block_that_can_grow_is_left_if_another_fits() -> None:
    """6 MiB fit at the segment's end (12 free) and in a larger hole (14): the hole is taken."""
    allocator = Allocator(expandable_segments=True)
    for which, size in enumerate((14 * MIB, 14 * MIB)):
        allocator.allocate(which, size)
    hole = allocator.used()[0].address
    allocator.free(0)
    allocator.allocate(2, 6 * MIB)
    assert allocator.used()[0].address == hole


@MODES
def test_what_cannot_be_is_refused(expandable: bool) -> None:
    with pytest.raises(ValueError, match="allocated already"):
        replay([(0, 1), (0, 1)], expandable_segments=expandable)
    with pytest.raises(ValueError, match="was not allocated"):
        replay([(0, 1), (0, -1), (0, -1)], expandable_segments=expandable)


# --- against a naive form, and what always holds ---


class Naive:
    """The default rules over plain intervals: gaps are found anew at each request."""

    def __init__(self) -> None:
        self.segments: list[tuple[int, int, bool]] = []  # begin, end, small
        self.blocks: dict[int, tuple[int, int]] = {}  # handed out: begin, end

    def gaps(self, small: bool) -> list[tuple[int, int]]:
        found = []
        for begin, end, kind in self.segments:
            if kind != small:
                continue
            at = begin
            for low, high in sorted(b for b in self.blocks.values() if begin <= b[0] < end):
                if low > at:
                    found.append((low - at, at))
                at = high
            if end > at:
                found.append((end - at, at))
        return sorted(found)

    def allocate(self, which: int, nbytes: int) -> None:
        size = -(-nbytes // 512) * 512
        small = size <= MIB
        fits = [gap for gap in self.gaps(small) if gap[0] >= size]
        if not fits:
            length = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB))
            length = length if length > 10**6 else length * 2 * MIB
            begin = self.segments[-1][1] + 1 if self.segments else 0
            self.segments.append((begin, begin + length, small))
            fits = [(length, begin)]
        length, begin = fits[0]
        cut = length - size >= 512 if small else length - size > MIB
        self.blocks[which] = (begin, begin + (size if cut else length))

    def state(self) -> tuple[int, int]:
        allocated = sum(end - begin for begin, end in self.blocks.values())
        return allocated, sum(end - begin for begin, end, _ in self.segments)


SIZES = st.one_of(
    st.integers(1, 2 * MIB),
    st.sampled_from([MIB, MIB + 1, 9 * MIB, 10 * MIB - 512, 10 * MIB, 11 * MIB, 19 * MIB]),
    st.integers(MIB, 64 * MIB),
)


@st.composite
def logs(draw: Any) -> list[Event]:
    """Up to 60 requests, each freed at once, later, or never."""
    alive: list[tuple[int, int]] = []
    events: list[Event] = []
    for which in range(draw(st.integers(1, 60))):
        while alive and draw(st.booleans()):
            index, size = alive.pop(draw(st.integers(0, len(alive) - 1)))
            events.append((index, -size))
        size = draw(SIZES)
        alive.append((which, size))
        events.append((which, size))
    return events


def play(allocator: Any, event: Event) -> None:
    which, nbytes = event
    if nbytes < 0:
        allocator.free(which)
    else:
        allocator.allocate(which, nbytes)


@settings(max_examples=60, deadline=None)
@given(logs())
def test_the_same_as_the_rules_read_naively(events: list[Event]) -> None:
    allocator, naive = Allocator(), Naive()
    for event in events:
        play(allocator, event)
        if event[1] < 0:
            del naive.blocks[event[0]]
        else:
            naive.allocate(*event)
        assert (allocator.allocated, allocator.reserved) == naive.state()


@MODES
@settings(max_examples=40, deadline=None)
@given(events=logs(), share=st.one_of(st.none(), st.floats(0.5, 1.2)))
def test_what_always_holds(expandable: bool, events: list[Event], share: float | None) -> None:
    needed = replay(events, expandable_segments=expandable).peak_allocated
    capacity = None if share is None else int(share * needed)
    allocator = Allocator(capacity, expandable)
    alive: dict[int, int] = {}
    for which, nbytes in events:
        if nbytes < 0:
            if which in alive:
                allocator.free(which)
                del alive[which]
        elif allocator.allocate(which, nbytes):
            alive[which] = nbytes
        used, idle = allocator.used(), allocator.idle()
        blocks = sorted([*used, *idle], key=lambda block: block.address)
        for one, other in itertools.pairwise(blocks):
            assert one.address + one.size <= other.address  # no overlap
            touching = one.address + one.size == other.address and one.after is other
            assert not (touching and one.free and other.free)  # merged
        assert sum(block.size for block in used) == allocator.allocated
        assert sum(block.size for block in blocks) == allocator.reserved  # nothing is lost
        assert allocator.rounded == sum(map(rounded, alive.values()))
        assert allocator.rounded <= allocator.allocated <= allocator.reserved
        assert allocator.reserved <= allocator.peak_reserved
        assert capacity is None or allocator.reserved <= capacity
        assert all(block.address % 512 == block.size % 512 == 0 for block in blocks)
    for which in list(alive):
        allocator.free(which)
    assert allocator.allocated == allocator.rounded == 0 == len(allocator.used())
    for block in allocator.idle():  # whole segments, or whole pages
        assert expandable or block.before is block.after is None
        assert block.size % (2 * MIB) == 0


@MODES
@settings(max_examples=25, deadline=None)
@given(events=logs())
def test_with_room_enough_the_capacity_does_not_matter(
    expandable: bool, events: list[Event]
) -> None:
    free = replay(events, expandable_segments=expandable)
    assert free.out_of_memory_at is None
    assert free.peak_allocated <= free.reserved_at_peak <= free.peak_reserved
    assert replay(events, capacity=free.peak_reserved, expandable_segments=expandable) == free
    begun = replay(events[: len(events) // 2], expandable_segments=expandable)
    assert begun.peak_reserved <= free.peak_reserved
    assert begun.peak_allocated <= free.peak_allocated


# --- with a tracker, and at size ---


def test_a_tracker_s_log_can_be_replayed() -> None:
    with MemoryTracker() as tracker:
        a = torch.empty(3 * MIB // 4)
        del a
        b, nothing = torch.empty(KIB // 4), torch.empty(0)
        c = torch.empty(12 * MIB // 4)
        view = c[5:]
        del c
    assert tracker.events() == [
        (0, 3 * MIB),
        (0, -3 * MIB),
        (1, KIB),
        (2, 0),
        (3, 12 * MIB),
    ]
    assert replay(tracker.events()) == Reserved(12 * MIB + KIB, 12 * MIB + KIB, 22 * MIB, 22 * MIB)
    del b, nothing, view
    assert tracker.events()[-3:] == [(1, -KIB), (2, 0), (3, -12 * MIB)]


@MODES
def test_a_long_log_takes_seconds(expandable: bool) -> None:
    """200 000 events, a thousand live blocks of all sizes: at most 10 us of processor time each."""
    events: list[Event] = []
    alive: deque[Event] = deque()
    size = 0
    for which in range(100_000):
        size = (size * 1103515245 + 12345) % 2**31
        alive.append((which, 1 + size % (1 << (9 + which % 18))))
        events.append(alive[-1])
        if len(alive) > 1000:
            gone, nbytes = alive.popleft()
            events.append((gone, -nbytes))
    begin = time.process_time()
    found = replay(events, expandable_segments=expandable)
    assert time.process_time() - begin < len(events) * 1e-5
    assert found.peak_allocated < found.peak_reserved < 2 * found.peak_allocated
