"""Which device and dtype a run uses where its config says "auto"."""

from __future__ import annotations

import warnings

import torch

from rewardprop_fast import processor


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
    """Whether the processor says that it has instructions for it."""
    return processor.bfloat16() is not None
