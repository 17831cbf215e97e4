"""The table of devices, names people type, and the time an operation takes at best."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rewardprop_fast.memory import DEVICES, Cost, Device, find_device
from rewardprop_fast.memory.cpu import measure_cpu

BF16, GIB = torch.bfloat16, 2**30

PLAIN = Device("x", "X", GIB, 100.0, 50.0, 20.0, 10.0, 8.0, 2.0, 2.0, attainable=0.5)


@pytest.mark.parametrize(
    ("dtype", "peak"),
    [
        (torch.bfloat16, 100.0),
        (torch.float16, 100.0),
        (torch.float32, 20.0),
        (torch.float64, 10.0),
        (torch.int8, 20.0),
    ],
)
def test_an_operation_takes_what_it_computes_or_what_it_moves(
    dtype: torch.dtype, peak: float
) -> None:
    assert PLAIN.peak(dtype) == peak
    assert PLAIN.seconds(Cost(1000, 1, dtype)) == 1000 / (peak * 0.5)
    assert PLAIN.seconds(Cost(1, 8000, dtype)) == 1000.0
    assert replace(PLAIN, peak_bfloat16=5.0).peak(dtype) == (5.0 if dtype == BF16 else peak)


def test_operations_follow_one_another() -> None:
    compute, move = Cost(1000, 1, BF16), Cost(1, 80, BF16)
    assert PLAIN.total_seconds({compute: 2, move: 3}) == 2 * 20.0 + 3 * 10.0
    assert PLAIN.total_seconds({}) == 0


@pytest.mark.parametrize(
    ("name", "gib", "tflops", "gb_per_second"),
    [
        # The figures on the vendor's own pages.
        ("rtx3090", 24, 71, 936),
        ("rtx4090", 24, 165, 1008),
        ("a100-40gb", 40, 312, 1555),
        ("a100-80gb", 80, 312, 2039),
        ("h100", 80, 989, 3350),
        ("l4", 24, 121, 300),
    ],
)
def test_published_figures(name: str, gib: int, tflops: float, gb_per_second: float) -> None:
    device = find_device(name)
    assert device.memory_bytes == gib * GIB
    assert device.peak(BF16) == tflops * 1e12
    assert device.bandwidth == gb_per_second * 1e9
    assert device.seconds(Cost(int(tflops * 1e12), 0, BF16)) == pytest.approx(1 / 0.65)


def test_every_device_is_plausible() -> None:
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.peak_16bit >= 1.99 * device.peak_float32
        assert device.peak_tf32 >= device.peak_float32 > 1.9 * device.peak_float64
        # Float32 units: 2 FLOP a cycle each, 64 or 128 to a multiprocessor, below 2.7 GHz.
        units = device.peak_float32 / (2 * device.multiprocessors)
        assert 1.3e9 < units / (64 if device.arch in (75, 80) else 128) < 2.7e9, name
        assert 0.8 * 15e9 <= device.upload == device.download < device.bandwidth / 10
    assert DEVICES["rtx4060ti-16gb"].upload == pytest.approx(DEVICES["rtx3090"].upload / 2)
    assert DEVICES["t4"].peak(BF16) == DEVICES["t4"].peak_float32 < DEVICES["t4"].peak_16bit


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("A100_80GB", "a100-80gb"),
        ("rtx3060 12gb", "rtx3060-12gb"),
        (" L4", "l4"),
    ],
)
def test_names_as_people_write_them(written: str, name: str) -> None:
    assert find_device(written).name == name


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("a100", "Nearest: a100-40gb, a100-80gb. Known"),
        ("rtx3080", "Nearest: rtx3080-10gb. Known"),
        ("rtx 3091", "rtx3090"),
        ("4090", "Nearest: rtx4090. Known"),
        ("gtx4090", "Nearest: rtx4090"),
        ("", "'' *. Known"),
        ("abacus", "'abacus'. Known"),
    ],
)
def test_an_unknown_name_lists_the_known_and_the_nearest(written: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="Unknown device") as error:
        find_device(written)
    message = str(error.value)
    assert nearest.replace(" *", "") in message
    assert message.endswith("cpu.")
    assert all(name in message for name in DEVICES)


def test_this_cpu_is_measured_once() -> None:
    device = find_device("CPU")
    assert device is measure_cpu()
    assert device.memory_bytes > GIB
    # Of any CPU that runs torch: float32 between 1 GFLOP/s and 100 TFLOP/s, 1 GB/s to 10 TB/s.
    assert 1e9 < device.peak(torch.float32) < 1e14
    assert device.peak(torch.float32) > device.peak(torch.float64)
    assert 1e9 < device.bandwidth < 1e13


def test_the_number_of_threads_is_part_of_what_was_measured() -> None:
    before, threads = measure_cpu(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert measure_cpu() is not before
    finally:
        torch.set_num_threads(threads)
    assert measure_cpu() is before
