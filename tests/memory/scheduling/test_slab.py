"""Places in a slab against an account kept byte by byte."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rewardprop_fast.memory.scheduling.slab import ALIGNMENT, Slab, rounded


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 20 * ALIGNMENT),
    st.lists(st.integers(-8, 4 * ALIGNMENT), min_size=1, max_size=40),
)
def test_places_do_not_overlap_and_everything_comes_back(nbytes: int, wishes: list[int]) -> None:
    """A positive wish takes that many bytes; any other gives back one of those that are taken."""
    slab = Slab(nbytes)
    units = nbytes // ALIGNMENT
    taken: list[tuple[int, int, int]] = []
    most = 0
    owner = [None] * units
    fences = [0] * units  # the latest fence that lies over each unit
    for number, wish in enumerate(wishes, 1):
        if wish > 0:
            size = rounded(wish) // ALIGNMENT
            fits = [
                begin
                for begin in range(units - size + 1)
                if all(cell is None for cell in owner[begin : begin + size])
            ]
            place = slab.take(wish)
            if place is None:
                assert not fits
                continue
            offset, fence = place
            begin = offset // ALIGNMENT
            assert offset % ALIGNMENT == 0
            assert begin == fits[0]  # first fit
            latest = max(fences[begin : begin + size])
            assert (fence[0] if fence else 0) >= latest
            owner[begin : begin + size] = [number] * size  # type: ignore[list-item]
            taken.append((offset, wish, size))
        elif taken:
            offset, wish, size = taken.pop(wish % len(taken))
            begin = offset // ALIGNMENT
            slab.give_back(offset, wish, (number, f"event {number}"))
            owner[begin : begin + size] = [None] * size
            fences[begin : begin + size] = [number] * size
        used = sum(cell is not None for cell in owner) * ALIGNMENT
        most = max(most, used)
        assert (slab.used, slab.peak) == (used, most)
    for offset, wish, _ in taken:
        slab.give_back(offset, wish)
    assert slab.used == 0
    assert slab.extents == ([(0, units * ALIGNMENT)] if units else [])


def test_a_fence_carries_its_event() -> None:
    slab = Slab(4 * ALIGNMENT)
    first, second = slab.take(ALIGNMENT), slab.take(1)
    assert first == (0, None)
    assert second == (ALIGNMENT, None)
    slab.give_back(ALIGNMENT, 1, (7, "late"))
    slab.give_back(0, ALIGNMENT, (3, "early"))
    assert slab.take(2 * ALIGNMENT) == (0, (7, "late"))
