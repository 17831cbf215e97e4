"""The module of CUDA C++ kernels: loaded once, or the reason it is not there.

Operators pass addresses, and `where` they lie: the device and torch's current stream on it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops import compiled, registry, triton_runtime

_NOTE = compiled.note_path("_cuda")


def module() -> Any:
    """``rewardprop_fast._cuda``. Raises ImportError with the reason where it cannot be used."""
    cuda, problem = _load()
    if cuda is None:
        raise ImportError(f"rewardprop_fast._cuda is not available: {problem}")
    return cuda


def why_missing() -> str | None:
    """None where the compiled module can be used, otherwise why not, in words for a person."""
    return _load()[1]


def why_not(*tensors: Tensor | None) -> str | None:
    """None where CUDA C++ kernels can run on these tensors' device, otherwise the reason."""
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if not triton_runtime.is_gpu(tensor):
            return f"it runs on CUDA devices, the tensors are on {tensor.device}"
        if tensor.is_meta and not registry.is_observing():
            return "the tensors have no memory"  # and its kernels are launched, not recorded
    if torch.version.hip is not None:
        return "it is built for NVIDIA GPUs, this torch is built for AMD's"
    problem = why_missing()
    if problem is not None:
        return problem
    found = triton_runtime.capability(given[0])
    if found < triton_runtime.LEAST_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, this device has {found[0]}.{found[1]}"
    return None


def where(tensor: Tensor) -> dict[str, int]:
    """The arguments that say where a kernel runs: the tensor's device, torch's stream on it."""
    device = tensor.device
    return {"device": device.index or 0, "stream": torch.cuda.current_stream(device).cuda_stream}


@cache
def _load() -> tuple[Any | None, str | None]:
    return compiled.load("_cuda", _NOTE)
