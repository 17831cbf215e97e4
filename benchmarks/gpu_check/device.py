"""A device to check and time on: a GPU; in tests, so that all else runs there, the CPU."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

#: Zeroed before each timed run; larger than any L2.
_FLUSHED_BYTES = 256 * 2**20


class Device(Protocol):
    """What checks and timings ask of a device."""

    type: str

    def prepare(self) -> None:
        """Once per process: exact products in float32 for everybody."""

    def describe(self) -> dict[str, Any]:
        """Name, capability, memory, versions of drivers."""

    def milliseconds(self, run: Callable[[], Any], repeats: int) -> list[float]:
        """Times of single runs, caches cold."""

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """The most memory that ``run`` holds beyond what was held before; None if unknown."""

    def release(self) -> None:
        """Give cached memory back."""

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether this error says that memory ran out."""

    def broken_by(self, error: BaseException) -> bool:
        """Whether no further work can succeed in this process after this error."""


class CudaDevice:
    """One NVIDIA GPU. ``cuda`` is torch.cuda; a test gives another."""

    type = "cuda"

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._flushed: torch.Tensor | None = None

    def why_missing(self) -> str | None:
        """None where there is a GPU that can run the kernels, otherwise one sentence."""
        if torch.version.cuda is None and not self._cuda.is_available():
            return (
                f"No GPU can be used: this PyTorch ({torch.__version__}) is built without CUDA; "
                "install the CUDA build from pytorch.org."
            )
        if not self._cuda.is_available():
            return "No NVIDIA GPU was found (torch.cuda.is_available() is False)."
        major, minor = self._cuda.get_device_capability()
        if (major, minor) < (8, 0):
            return (
                f"{self._cuda.get_device_name()} has compute capability {major}.{minor}; "
                "the kernels need 8.0 or newer."
            )
        return None

    def prepare(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    def describe(self) -> dict[str, Any]:
        properties = self._cuda.get_device_properties(0)
        major, minor = self._cuda.get_device_capability()
        return {
            "name": self._cuda.get_device_name(),
            "capability": f"{major}.{minor}",
            "memory_gib": round(properties.total_memory / 2**30, 2),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }

    def milliseconds(self, run: Callable[[], Any], repeats: int) -> list[float]:
        if self._flushed is None:
            self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=self.type)
        pairs = [
            (self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        for begin, end in pairs:
            # Flushing also keeps the GPU busy while Python prepares the launches of the run (up to
            # 0.3 ms on the fastest card), so that the device's time is measured, not Python's.
            for _ in range(4):
                self._flushed.zero_()
            begin.record()
            run()
            end.record()
        self._cuda.synchronize()
        return [float(begin.elapsed_time(end)) for begin, end in pairs]

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        self._cuda.synchronize()
        before = self._cuda.memory_allocated()
        self._cuda.reset_peak_memory_stats()
        kept = run()
        self._cuda.synchronize()
        del kept
        return int(self._cuda.max_memory_allocated()) - int(before)

    def release(self) -> None:
        self._flushed = None
        self._cuda.empty_cache()

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)

    def broken_by(self, error: BaseException) -> bool:
        # After an illegal access every call fails, in this process only.
        return "CUDA error" in str(error) or "device-side assert" in str(error)


class CpuDevice:
    """The CPU in a GPU's place: the same steps by the wall clock."""

    type = "cpu"

    def why_missing(self) -> str | None:
        return None

    def prepare(self) -> None:
        torch.set_num_threads(1)

    def describe(self) -> dict[str, Any]:
        return {"name": f"CPU {platform.machine()}", "capability": "-"}

    def milliseconds(self, run: Callable[[], Any], repeats: int) -> list[float]:
        found = []
        for _ in range(repeats):
            begin = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - begin))
        return found

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        run()
        return None

    def release(self) -> None:
        pass

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError) or "can't allocate memory" in str(error)

    def broken_by(self, error: BaseException) -> bool:
        return False


DEVICES: dict[str, Callable[[], CudaDevice | CpuDevice]] = {"cuda": CudaDevice, "cpu": CpuDevice}
