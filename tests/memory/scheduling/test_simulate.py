"""Times in closed form."""

from __future__ import annotations

import time

import pytest

from rewardprop_fast.memory import SegmentTimes, simulate
from rewardprop_fast.memory.scheduling.slab import rounded

MB = 10**6


def step(count: int, nbytes: int = MB, forward: float = 0.01, backward: float = 0.02) -> list:
    return [SegmentTimes(forward, backward, nbytes) for _ in range(count)]


def test_nothing_offloaded_takes_its_time() -> None:
    found = simulate(step(5, nbytes=0), 1e9, 1e9)
    assert found.seconds == pytest.approx(0.15)
    assert (found.stall_seconds, found.peak_host_bytes, found.peak_extra_device_bytes) == (0, 0, 0)


def test_copies_that_are_shorter_than_the_computation_are_free() -> None:
    found = simulate(step(10), 1e8, 1e8)  # 0.01 s each: as long as a forward pass
    assert found.stall_seconds == pytest.approx(0, abs=1e-12)
    assert found.seconds == pytest.approx(0.3)
    assert found.peak_host_bytes == 9 * rounded(MB) + rounded(MB)
    assert found.peak_extra_device_bytes == 2 * MB


def test_a_slow_link_decides() -> None:
    """0.1 s a copy, 10 of them out; the last stays, since the backward pass begins with it."""
    found = simulate(step(10), 1e7, 1e7)
    # out: the first begins at 0.01, and the tenth segment waits for the ninth copy to end
    forward = 0.01 + 9 * 0.1
    # back: the ninth is asked for at once and arrives 0.1 s later, eight more behind it; the last
    # backward pass follows
    backward = 9 * 0.1 + 0.02
    assert found.seconds == pytest.approx(forward + backward)
    assert found.stall_seconds == pytest.approx(forward + backward - 0.3)


def test_without_a_window_every_copy_back_is_waited_for() -> None:
    found = simulate(step(10), 1e12, 1e8, window=0)
    assert found.stall_seconds == pytest.approx(9 * 0.01, abs=1e-4)
    assert found.peak_extra_device_bytes == 2 * MB
    wide = simulate(step(10), 1e12, 1e8, window=3)
    assert wide.peak_extra_device_bytes == 4 * MB
    assert wide.stall_seconds == pytest.approx(0, abs=1e-9)


def test_without_a_stash_every_copy_out_is_waited_for() -> None:
    found = simulate(step(10), 1e8, 1e12, stash=0)
    assert found.stall_seconds == pytest.approx(10 * 0.01, abs=1e-4)


def test_what_the_slab_does_not_hold_stays() -> None:
    found = simulate(step(10), 1e12, 1e12, slab_bytes=3 * rounded(MB))
    assert found.peak_host_bytes == 3 * rounded(MB)
    assert found.stayed_bytes == 7 * MB
    assert found.stall_seconds == pytest.approx(0, abs=1e-4)


def test_a_thousand_segments_take_milliseconds() -> None:
    segments = step(1000)
    seconds = []
    for _ in range(7):
        begin = time.perf_counter()
        simulate(segments, 1e8, 1e8)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.05  # 8 ms on a quiet machine


def test_bandwidths_are_positive() -> None:
    with pytest.raises(ValueError, match="positive bytes/s, not 0"):
        simulate([], 0, 1e9)
    with pytest.raises(ValueError, match="window is -1"):
        simulate([], 1e9, 1e9, window=-1)
