"""This machine's CPU as a device: measured, with as many threads as torch uses now."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from rewardprop_fast.memory.devices import Device

_PRODUCT = 1024  # rows, columns and depth: large enough for a library's best, 2 GFLOP
_STREAM_BYTES = 2**27  # beyond any cache


def measure_cpu() -> Device:
    """GEMM rates in bfloat16, float16, float32 and float64, bandwidth of a large copy, memory.

    The first call takes about a second; its result is kept as long as the process lives, for each
    number of threads. Products reach all of such a peak, so `Device.attainable` is 1.
    """
    return _measure(torch.get_num_threads())


@cache
def _measure(threads: int) -> Device:
    bfloat16, float16, float32, float64 = (
        _gemm_rate(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    )
    bandwidth = _copy_rate()
    return Device(
        name="cpu",
        title=f"CPU, {threads} threads",
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        peak_16bit=float16,
        peak_tf32=float32,
        peak_float32=float32,
        peak_float64=float64,
        bandwidth=bandwidth,
        # Host and device are one memory: a copy reads and writes it.
        upload=bandwidth / 2,
        download=bandwidth / 2,
        peak_bfloat16=bfloat16,
        attainable=1.0,
    )


def _gemm_rate(dtype: torch.dtype) -> float:
    # Small first: without hardware for a dtype a large product would take seconds.
    size = _PRODUCT if _rate(256, dtype) > 5e9 else 256
    return _rate(size, dtype)


def _rate(size: int, dtype: torch.dtype) -> float:
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best_of(3, torch.mm, a, b)


def _copy_rate() -> float:
    source = torch.ones(_STREAM_BYTES // 4)
    return 2 * _STREAM_BYTES / _best_of(3, torch.empty_like(source).copy_, source)


def _best_of(times: int, function: Callable[..., Any], *args: Any) -> float:
    """Seconds of the fastest call, after one that is not counted: noise only ever adds."""
    with torch.inference_mode():
        function(*args)
        found = []
        for _ in range(times):
            begin = time.perf_counter()
            function(*args)
            found.append(time.perf_counter() - begin)
    return min(found)
