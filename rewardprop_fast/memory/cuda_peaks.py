"""What CUDA's caching allocator itself says was the most, by phase."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CudaPeak:
    """Bytes of the current device, most at once.

    Attributes:
        allocated: handed out in blocks, ``torch.cuda.max_memory_allocated``: tensors rounded up,
            and the workspaces that operations take from the allocator.
        reserved: taken from the driver, ``torch.cuda.max_memory_reserved``.
    """

    allocated: int
    reserved: int


class CudaPeaks:
    """Reads PyTorch's statistics at the borders of phases, and resets their peaks there.

    Attributes:
        by_phase: phase -> the most in it so far.
    """

    def __init__(self) -> None:
        self.by_phase: dict[str, CudaPeak] = {}

    def begin(self) -> None:
        """What comes from here on counts."""
        torch.cuda.reset_peak_memory_stats()

    def end(self, phase: str) -> None:
        """What came since the last border was of ``phase``."""
        before = self.by_phase.get(phase, CudaPeak(0, 0))
        self.by_phase[phase] = CudaPeak(
            max(before.allocated, torch.cuda.max_memory_allocated()),
            max(before.reserved, torch.cuda.max_memory_reserved()),
        )
        self.begin()
