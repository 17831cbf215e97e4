"""Launching Triton kernels: on a GPU, in Triton's interpreter on a CPU, or only recorded.

Operators launch through `launch`, never directly, so that every configuration that would run on a
GPU can be listed and compiled ahead of time without one: `recording` with tensors of the device
"meta" gathers the launches instead of running them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops import registry

#: Compute capability assumed where no device can be asked: a consumer card of 24 GB (RTX 3090).
DEFAULT_CAPABILITY = (8, 6)

#: Kernels rely on bf16 tensor cores and asynchronous copies.
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what Triton needs to compile it, and its grid."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by parameter name: tensors (of any device), numbers, None
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass
class Recording:
    """What `recording` gathers: the launches, in order."""

    capability: tuple[int, int]
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("rewardprop_triton_recording", default=None)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; decided before they are imported."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def why_not(*tensors: Tensor | None) -> str | None:
    """None where Triton kernels can run on these tensors, otherwise the reason they cannot.

    On a CPU they run only in the interpreter, which is slow, and only where "triton" is asked for
    by name.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not _installed():
        return "triton is not installed (pip install 'rewardprop-fast[gpu]')"
    kinds = {tensor.device.type for tensor in given}
    if kinds == {"meta"} and _recording.get() is not None:
        return None
    if kinds == {"cpu"}:
        if interpreted() and _asked_for():
            # Triton's interpreter computes wrong values in bfloat16.
            if any(tensor.dtype == torch.bfloat16 for tensor in given):
                return "Triton's interpreter has no bfloat16"
            return None
        return "it runs on a GPU, the tensors are on the CPU"
    if kinds != {"cuda"}:
        return f"it runs on CUDA devices, the tensors are on {', '.join(sorted(kinds))}"
    found = capability(given[0])
    if found < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, this device has {found[0]}.{found[1]}"
    return None


def capability(tensor: Tensor) -> tuple[int, int]:
    """(major, minor) of the device that a launch on this tensor compiles for."""
    recording = _recording.get()
    if recording is not None:
        return recording.capability
    if tensor.device.type == "cuda" and torch.cuda.is_available():  # not a fake one
        return _capability(tensor.device.index or 0)
    return DEFAULT_CAPABILITY


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constexprs: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 1,
) -> None:
    """Run ``kernel`` on ``grid``; ``arguments`` and ``constexprs`` go by parameter name.

    An empty grid runs nothing.
    """
    recording = _recording.get()
    if recording is not None:
        recording.launches.append(
            Launch(kernel, grid, dict(arguments), dict(constexprs), num_warps, num_stages)
        )
        return
    if 0 in grid:
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else _nothing():
        kernel[grid](**arguments, **constexprs, num_warps=num_warps, num_stages=num_stages)


@contextmanager
def recording(capability: tuple[int, int] = DEFAULT_CAPABILITY) -> Iterator[Recording]:
    """Gather launches instead of running them, as a device of this capability would get them.

    Call an operator (or a form's own ``forward`` or ``backward``) with tensors of the device "meta"
    inside the block, and inside ``ops.backend("triton", strict=True)``.
    """
    gathered = Recording(capability)
    token = _recording.set(gathered)
    try:
        yield gathered
    finally:
        _recording.reset(token)


def is_gpu(tensor: Tensor) -> bool:
    """Whether it is on a GPU, or under `recording` stands for one that is."""
    kind = tensor.device.type
    return kind == "cuda" or (kind == "meta" and _recording.get() is not None)


def recorded(kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake``, which under `recording` is ``kernel`` itself: it launches, and that is noted."""

    def run(*args: Any) -> Any:
        return fake(*args) if _recording.get() is None else kernel(*args)

    return run


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _asked_for() -> bool:
    wish = registry.current()
    return "triton" in (wish.name, *wish.by_operator.values())


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
