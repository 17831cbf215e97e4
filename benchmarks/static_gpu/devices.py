"""The limits of the GPUs that figures are modelled for, from NVIDIA's documents.

Sources: "NVIDIA Ampere GA102 GPU Architecture" (RTX 3090), "NVIDIA Ada GPU Architecture" (4090),
"NVIDIA A100 Tensor Core GPU Architecture" (A100 SXM 80 GB: its data sheet for the bandwidth),
"NVIDIA H100 Tensor Core GPU Architecture" (H100 SXM); blocks, threads, registers and shared memory
from the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".

Peaks are dense, with float32 accumulation, at boost clock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One GPU. Throughputs per second, sizes in bytes."""

    name: str
    arch: int  # 86 is compute capability 8.6
    multiprocessors: int
    peak_16bit: float  # FLOP/s of the tensor cores on bfloat16 and float16
    peak_tf32: float
    peak_float32: float  # without tensor cores
    bandwidth: float
    l2_bytes: int
    shared_per_multiprocessor: int
    shared_per_block: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    registers_per_multiprocessor: int = 65536


_KIB, _MIB = 2**10, 2**20

RTX_3090 = Device(
    "RTX 3090", 86, 82, 71e12, 35.6e12, 35.6e12, 936e9, 6 * _MIB, 100 * _KIB, 99 * _KIB, 1536, 16
)
RTX_4090 = Device(
    "RTX 4090",
    89,
    128,
    165e12,
    82.6e12,
    82.6e12,
    1008e9,
    72 * _MIB,
    100 * _KIB,
    99 * _KIB,
    1536,
    24,
)
A100 = Device(
    "A100", 80, 108, 312e12, 156e12, 19.5e12, 2039e9, 40 * _MIB, 164 * _KIB, 163 * _KIB, 2048, 32
)
H100 = Device(
    "H100", 90, 132, 989e12, 494e12, 67e12, 3350e9, 50 * _MIB, 228 * _KIB, 227 * _KIB, 2048, 32
)

DEVICES = (RTX_3090, RTX_4090, A100, H100)

#: Shared memory of one block on each architecture that code is compiled for.
SHARED_LIMITS = {device.arch: device.shared_per_block for device in DEVICES}


def nearest(name: str) -> Device | None:
    """The device of this table that a driver's device name means, if any.

    Its relatives of almost the same name have other limits.
    """
    if re.search(r"\b(Ti|SUPER|D|Laptop|PCIE|NVL|40GB)\b", name, re.IGNORECASE):
        return None
    for device in DEVICES:
        if re.search(rf"\b{device.name.removeprefix('RTX ')}\b", name):
            return device
    return None
