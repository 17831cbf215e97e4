"""The limits of the GPUs that figures are modelled for, from NVIDIA's documents.

Throughputs are those of `rewardprop_fast.memory.devices`; what a multiprocessor holds at once
follows from its compute capability (CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability"). A100 and H100 are the SXM cards with 80 GB.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewardprop_fast.memory.devices import find_device

_KIB = 2**10


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


#: Shared memory of a multiprocessor and of a block, threads and blocks of a multiprocessor.
_LIMITS = {
    80: (164 * _KIB, 163 * _KIB, 2048, 32),
    86: (100 * _KIB, 99 * _KIB, 1536, 16),
    89: (100 * _KIB, 99 * _KIB, 1536, 24),
    90: (228 * _KIB, 227 * _KIB, 2048, 32),
}


def _device(name: str, listed: str) -> Device:
    card = find_device(listed)
    return Device(
        name,
        card.arch,
        card.multiprocessors,
        card.peak_16bit,
        card.peak_tf32,
        card.peak_float32,
        card.bandwidth,
        card.l2_bytes,
        *_LIMITS[card.arch],
    )


RTX_3090 = _device("RTX 3090", "rtx3090")
RTX_4090 = _device("RTX 4090", "rtx4090")
A100 = _device("A100", "a100-80gb")
H100 = _device("H100", "h100")

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
