"""Timing on a CPU that others use too: variants interleaved, several repeats, ratios of pairs.

A machine that slows down slows every variant of a round, so a speed-up is the median of the rounds'
own ratios, not a ratio of medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant over the rounds, in order."""

    seconds: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        """Minimum and percentiles in milliseconds."""
        return {
            "min_ms": 1e3 * min(self.seconds),
            "p20_ms": 1e3 * percentile(self.seconds, 0.2),
            "p50_ms": 1e3 * percentile(self.seconds, 0.5),
            "p80_ms": 1e3 * percentile(self.seconds, 0.8),
        }


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 9,
    least_seconds: float = 0.01,
    threads: int = 1,
) -> dict[str, Timing]:
    """Time each variant once a round; short ones are repeated within a round and averaged.

    The order is turned round every other round, so that none always runs in another's wake.

    Args:
        least_seconds: how long a variant runs within a round at least.
        threads: torch's threads meanwhile.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        repeats = {name: _repeats(run, least_seconds) for name, run in variants.items()}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for index in range(rounds):
            names = list(variants) if index % 2 == 0 else list(reversed(variants))
            for name in names:
                seconds[name].append(_time(variants[name], repeats[name]))
    finally:
        torch.set_num_threads(before)
    return {name: Timing(tuple(found)) for name, found in seconds.items()}


def speedup(baseline: Timing, ours: Timing) -> float:
    """How many times faster ``ours`` is: the median over the rounds."""
    ratios = [a / b for a, b in zip(baseline.seconds, ours.seconds, strict=True)]
    return statistics.median(ratios)


def _repeats(run: Callable[[], Any], least_seconds: float) -> int:
    run()  # warms up: first calls pack weights, compile, allocate
    return max(1, round(least_seconds / max(_time(run, 1), 1e-9)))


def _time(run: Callable[[], Any], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats
