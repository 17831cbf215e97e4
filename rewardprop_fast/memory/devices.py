"""What known cards can do: memory, FLOP/s, bandwidth; and how long an operation takes at best.

Times that follow from this table are modelled, not measured. Sources, all NVIDIA's: the whitepapers
"NVIDIA Turing GPU Architecture" (T4: its data sheet), "NVIDIA Ampere GA102 GPU Architecture",
"NVIDIA A100 Tensor Core GPU Architecture", "NVIDIA Ada GPU Architecture", "NVIDIA H100 Tensor Core
GPU Architecture"; the data sheets of A10, A10G, L4, A100 (its bandwidths) and H100; the product
pages of the GeForce cards that no whitepaper lists. Peaks are dense, with float32 accumulation, at
boost clock. For those GeForce cards the tensor cores' peak is twice that of the float32 units, as
it is for every GeForce card of Ampere and Ada in the whitepapers.

A card's memory is its nominal size; a driver shows 1 to 8 % less (most where ECC lies in the same
memory), and a process's context takes some hundred MiB of that.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rewardprop_fast.memory.cost import Cost

_GB, _MIB, _GIB = 10**9, 2**20, 2**30

#: What of a link's raw rate arrives in large copies from and to pinned memory: packets of 128 to
#: 256 bytes carry headers of 20 to 28 (PCI Express Base Specification), and flow control takes its
#: share. One way alone; both at once are no slower on paper.
PCIE_SHARE = 0.8

#: What large products and convolutions reach of the peak. An assumption, between what vendors'
#: libraries reach on their best sizes (80 to 90 %) and what convolutions and attention do (50 %).
TENSOR_SHARE = 0.65


@dataclass(frozen=True)
class Device:
    """One device. Rates per second, sizes in bytes.

    Attributes:
        name: as it is asked for, "rtx3090".
        title: as its maker writes it.
        memory_bytes: nominal.
        peak_16bit: FLOP/s on float16; and on bfloat16 unless ``peak_bfloat16`` says otherwise.
        peak_tf32: of float32 products where TF32 is allowed; PyTorch's default is not to.
        peak_float32, peak_float64: without tensor cores.
        bandwidth: of the device's memory.
        upload, download: practical rates from and to the host's pinned memory.
        attainable: the share of a peak that large products reach.
        arch: compute capability, 86 for 8.6; 0 for a CPU.
        multiprocessors, l2_bytes: of a GPU.
    """

    name: str
    title: str
    memory_bytes: int
    peak_16bit: float
    peak_tf32: float
    peak_float32: float
    peak_float64: float
    bandwidth: float
    upload: float
    download: float
    peak_bfloat16: float | None = None
    attainable: float = TENSOR_SHARE
    arch: int = 0
    multiprocessors: int = 0
    l2_bytes: int = 0

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s in a dtype; in one that is not listed, those of float32."""
        if dtype == torch.bfloat16 and self.peak_bfloat16 is not None:
            return self.peak_bfloat16
        if dtype in (torch.bfloat16, torch.float16):
            return self.peak_16bit
        return self.peak_float64 if dtype == torch.float64 else self.peak_float32

    def seconds(self, cost: Cost) -> float:
        """Modelled time of one operation: what it computes or what it moves, whichever is longer.

        Launches, and bytes beyond the floor, are left out.
        """
        compute = cost.flops / (self.peak(cost.dtype) * self.attainable)
        return max(compute, cost.nbytes / self.bandwidth)

    def total_seconds(self, costs: Mapping[Cost, int]) -> float:
        """Modelled time of operations one after another, `CostCounter.costs` say."""
        return sum(self.seconds(cost) * count for cost, count in costs.items())


def _gpu(
    name: str,
    title: str,
    gib: int,
    peaks: tuple[float, float, float],
    gb_per_second: float,
    pcie: float,
    arch: int,
    multiprocessors: int,
    l2_mib: int,
    peak_bfloat16: float | None = None,
) -> Device:
    """``peaks``: TFLOP/s in 16 bits, TF32, float32; ``pcie``: GB/s of the raw link."""
    half, tf32, single = (peak * 1e12 for peak in peaks)
    link = pcie * _GB * PCIE_SHARE
    return Device(
        name,
        title,
        gib * _GIB,
        half,
        tf32,
        single,
        single / _FLOAT32_UNITS_PER_FLOAT64[arch],
        gb_per_second * _GB,
        link,
        link,
        peak_bfloat16,
        arch=arch,
        multiprocessors=multiprocessors,
        l2_bytes=l2_mib * _MIB,
    )


#: By compute capability.
_FLOAT32_UNITS_PER_FLOAT64 = {75: 32, 80: 2, 86: 64, 89: 64, 90: 2}

#: GB/s each way: 8, 16, 32 GT/s a lane, 128 of 130 bits.
_GEN3_X16, _GEN4_X8, _GEN4_X16, _GEN5_X16 = 15.75, 15.75, 31.5, 63.0

DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        # name, title, GiB, TFLOP/s (16 bit, TF32, float32), GB/s, PCIe, arch, SMs, L2
        # The tensor cores of Turing know neither bfloat16 nor TF32: both run as float32.
        _gpu("t4", "Tesla T4", 16, (65, 8.1, 8.1), 320, _GEN3_X16, 75, 40, 4, 8.1e12),
        _gpu("rtx3060-12gb", "RTX 3060", 12, (25.4, 12.7, 12.7), 360, _GEN4_X16, 86, 28, 3),
        _gpu("rtx3070", "RTX 3070", 8, (40.6, 20.3, 20.3), 448, _GEN4_X16, 86, 46, 4),
        _gpu("rtx3080-10gb", "RTX 3080", 10, (59.5, 29.8, 29.8), 760, _GEN4_X16, 86, 68, 5),
        _gpu("rtx3090", "RTX 3090", 24, (71, 35.6, 35.6), 936, _GEN4_X16, 86, 82, 6),
        _gpu("a10", "A10", 24, (125, 62.5, 31.2), 600, _GEN4_X16, 86, 72, 6),
        _gpu("a10g", "A10G", 24, (70, 35, 35), 600, _GEN4_X16, 86, 80, 6),
        _gpu("a100-40gb", "A100 40GB", 40, (312, 156, 19.5), 1555, _GEN4_X16, 80, 108, 40),
        _gpu("a100-80gb", "A100 80GB", 80, (312, 156, 19.5), 2039, _GEN4_X16, 80, 108, 40),
        _gpu("rtx4060", "RTX 4060", 8, (30.2, 15.1, 15.1), 272, _GEN4_X8, 89, 24, 24),
        _gpu("rtx4060ti-16gb", "RTX 4060 Ti", 16, (44, 22, 22), 288, _GEN4_X8, 89, 34, 32),
        _gpu("rtx4070", "RTX 4070", 12, (58.2, 29.1, 29.1), 504, _GEN4_X16, 89, 46, 36),
        _gpu("rtx4080", "RTX 4080", 16, (97.5, 48.7, 48.7), 716.8, _GEN4_X16, 89, 76, 64),
        _gpu("rtx4090", "RTX 4090", 24, (165, 82.6, 82.6), 1008, _GEN4_X16, 89, 128, 72),
        _gpu("l4", "L4", 24, (121, 60, 30.3), 300, _GEN4_X16, 89, 58, 48),
        _gpu("h100", "H100", 80, (989, 494, 67), 3350, _GEN5_X16, 90, 132, 50),
    )
}


def find_device(name: str) -> Device:
    """The device of this name; "cpu" is this machine's, measured when it is first asked for.

    Case, blanks, dashes and a leading "NVIDIA" or "GeForce" do not matter: "RTX 3090" is "rtx3090".

    Raises:
        ValueError: no such device; the message lists the known ones, and the nearest.
    """
    wanted = _plain(name)
    if wanted == "cpu":
        from rewardprop_fast.memory.cpu import measure_cpu

        return measure_cpu()
    by_plain_name = {_plain(known): device for known, device in DEVICES.items()}
    if wanted in by_plain_name:
        return by_plain_name[wanted]
    containing = [plain for plain in by_plain_name if wanted and wanted in plain]
    similar = containing or difflib.get_close_matches(wanted, by_plain_name, n=3, cutoff=0.6)
    nearest = ", ".join(by_plain_name[plain].name for plain in similar)
    hint = f" Nearest: {nearest}." if nearest else ""
    raise ValueError(f"Unknown device {name!r}.{hint} Known: {', '.join(DEVICES)}, cpu.")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", str(name).lower())
