"""How variants are timed against each other."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.timing import Timing, interleaved, percentile, speedup


def test_percentiles_lie_between_the_values() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0], 0.0) == 1.0
    assert percentile([1.0, 2.0], 1.0) == 2.0
    assert percentile([7.0], 0.8) == 7.0


def test_a_speedup_is_of_pairs_and_does_not_see_a_machine_slowing_down() -> None:
    slow, fast = Timing((2.0, 4.0, 20.0)), Timing((1.0, 2.0, 10.0))
    assert speedup(slow, fast) == 2.0
    assert slow.summary() == pytest.approx(
        {"min_ms": 2e3, "p20_ms": 2.8e3, "p50_ms": 4e3, "p80_ms": 1.36e4}
    )


def test_variants_take_turns_on_the_threads_asked_for() -> None:
    order: list[str] = []
    threads: set[int] = set()

    def run(name: str) -> None:
        order.append(name)
        threads.add(torch.get_num_threads())
        time.sleep(0.002)

    before = torch.get_num_threads()
    found = interleaved(
        {"a": lambda: run("a"), "b": lambda: run("b")}, rounds=4, least_seconds=0, threads=1
    )
    assert order[4:] == list("abbaabba")
    assert threads == {1}
    assert torch.get_num_threads() == before
    assert all(seconds >= 0.002 for timing in found.values() for seconds in timing.seconds)


def test_short_ones_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def run() -> None:
        nonlocal now
        now += 0.001

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    found = interleaved({"a": run}, rounds=2, least_seconds=0.02)
    assert now == pytest.approx(0.001 * (2 + 2 * 20)), "two to see how long, twenty a round"
    assert found["a"].seconds == pytest.approx((0.001, 0.001))
