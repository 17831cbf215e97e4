"""How long a launch would take on a GPU that is not there: modelled, never measured.

time = max(FLOP / peak, bytes / bandwidth), each stretched where the grid does not fill the device
evenly. Left out: launch latency, instruction issue, exponentials, bank conflicts, actual clocks.

Bytes from device memory: none of a tensor that an earlier launch of the pass left in L2 (`Cache`);
otherwise a program's first read of a tile counts, and it counts again
 - in another program of the same wave not at all (it is in L2 or on its way there),
 - in a later wave if the tensor is larger than half of L2,
 - in the same program if what all running programs hold of the tensor is larger than half of L2.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from math import ceil

from benchmarks.static_gpu.compiling import Resources
from benchmarks.static_gpu.devices import Device
from benchmarks.static_gpu.traffic import Stream, Traffic

_WARP = 32


@dataclass(frozen=True)
class Modelled:
    """One launch on one device; all of it modelled."""

    seconds: float
    bound: str  # "compute" or "memory"
    bytes_moved: float
    flops: float
    blocks_per_multiprocessor: int
    waves: float


def blocks_per_multiprocessor(resources: Resources, num_warps: int, device: Device) -> int:
    """Blocks that run at once on one multiprocessor. 0 where none fits.

    Registers are given to a warp in units of 256; each block takes 1 KiB of shared memory more.
    """
    if resources.shared_bytes > device.shared_per_block:
        return 0
    registers = num_warps * ceil(resources.registers * _WARP / 256) * 256
    return min(
        device.registers_per_multiprocessor // max(registers, 1),
        device.shared_per_multiprocessor // (resources.shared_bytes + 1024),
        device.threads_per_multiprocessor // (num_warps * _WARP),
        device.blocks_per_multiprocessor,
    )


@dataclass
class Cache:
    """Which tensors L2 holds between launches: the last ones that fit into half of it together."""

    device: Device
    held: dict[int, int] = field(default_factory=dict)  # memory -> bytes, the last used last

    def use(self, memory: int, nbytes: int) -> None:
        """A launch has read or written this memory."""
        self.held.pop(memory, None)
        self.held[memory] = nbytes
        while self.held and sum(self.held.values()) > self.device.l2_bytes / 2:
            del self.held[next(iter(self.held))]


def model(
    traffic: Traffic,
    resources: Resources,
    num_warps: int,
    device: Device,
    cached: Set[str] = frozenset(),
) -> Modelled:
    """``cached`` names the tensors that L2 holds when the launch begins."""
    blocks = blocks_per_multiprocessor(resources, num_warps, device)
    wave = max(1, blocks) * device.multiprocessors
    moved = sum(
        (0.0 if name in cached else read_bytes(stream, traffic.programs, wave, device))
        + stream.written * traffic.programs
        for name, stream in traffic.streams.items()
    )
    flops = traffic.flops * traffic.programs
    peak = {
        "tf32": device.peak_tf32,
        "tf32x3": device.peak_tf32 / 3,  # three products for one, nearly exact
        "float32": device.peak_float32,
    }.get(traffic.operand, device.peak_16bit)
    compute = flops / peak * unevenness(traffic.programs, wave, device)
    # Memory is shared by all: it is only slow to drain while multiprocessors stand idle.
    memory = moved / device.bandwidth * max(1.0, device.multiprocessors / max(1, traffic.programs))
    return Modelled(
        max(compute, memory),
        "compute" if compute >= memory else "memory",
        moved,
        flops,
        blocks,
        traffic.programs / wave,
    )


def unevenness(programs: int, wave: int, device: Device) -> float:
    """How much longer the fullest multiprocessor works than if all had the same share.

    Whole waves fill every multiprocessor; the rest is dealt out one block to each in turn.
    """
    if programs == 0:
        return 1.0
    whole, rest = divmod(programs, wave)
    fullest = whole * wave // device.multiprocessors + ceil(rest / device.multiprocessors)
    return fullest * device.multiprocessors / programs


def read_bytes(stream: Stream, programs: int, wave: int, device: Device) -> float:
    """From device memory; see the head of this file."""
    if stream.read == 0:
        return 0.0
    least = min(float(stream.nbytes), stream.read_distinct * programs)
    most = max(least, stream.read * programs)
    distinct = _distinct_in_a_wave(stream, programs, wave)
    held = distinct * stream.read_distinct
    first = least
    if stream.nbytes > device.l2_bytes / 2:  # gone when the next wave comes
        first = max(least, held * programs / min(wave, programs))
    again = 0.0
    if held > device.l2_bytes / 2:  # gone before the program comes back
        again = (stream.read - stream.read_distinct) * distinct * programs / min(wave, programs)
    return min(first + again, most)


def _distinct_in_a_wave(stream: Stream, programs: int, wave: int) -> float:
    """Tiles that the programs of one wave read, each counted once."""
    running = min(wave, programs)
    most = max(1.0, stream.nbytes / stream.read_distinct)
    seen = stream.tiles[:running] or range(running)
    return min(len(set(seen)) * running / len(seen), most)
