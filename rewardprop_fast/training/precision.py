"""Which device and dtype a run uses where its config says "auto"."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

_FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, Arm


def resolve_device(name: str) -> torch.device:
    """ "auto" takes the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" takes bfloat16 where the hardware multiplies it fast, else float32.

    float16 is never chosen: its narrow range loses the small gradients of a reward averaged over
    an image, and on CPUs it is slower than anything else. Warns where bfloat16 is asked of a CPU
    that has no instructions for it.
    """
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        if dtype == torch.bfloat16 and device.type == "cpu" and not cpu_has_fast_bf16():
            warnings.warn(
                "This CPU has no bfloat16 instructions: products take several times as long as in"
                ' float32 (eight times on one with AVX2 that was measured). "auto" takes float32.',
                stacklevel=2,
            )
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if cpu_has_fast_bf16() else torch.float32


def cpu_has_fast_bf16() -> bool:
    """Whether /proc/cpuinfo names bf16 instructions; False where it cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    line = next((x for x in text.splitlines() if x.lower().startswith(("flags", "features"))), "")
    return any(flag in line.split() for flag in _FAST_BF16)
