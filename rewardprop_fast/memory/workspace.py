"""What an operation uses for itself and has freed when it returns.

No tracker of live tensors sees it. It is a column of its own beside the live bytes, because it is
known less well:

- Of the library's own operators it is known to the byte: `workspace_of` runs the form that a GPU
  would get on tensors without memory and watches what it allocates.
- Of PyTorch's operations on a GPU `workspace_of` knows those that its sources allocate by a rule.
  cuDNN and cuBLAS choose what they like; cuBLAS at least from a fixed space (`cublas_workspace`).
- On a CPU `measure_workspace` measures any call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from rewardprop_fast.memory.measure import MemoryTracker
from rewardprop_fast.memory.signature import signature
from rewardprop_fast.ops import triton_runtime
from rewardprop_fast.ops.images import is_channels_last, memory_format
from rewardprop_fast.ops.registration import kernel_of

aten = torch.ops.aten

_MIB = 2**20


def cublas_workspace(arch: int, threads: int = 2) -> int:
    """Bytes that PyTorch takes for cuBLAS, once and for good, from its own allocator.

    One space for every thread that multiplies: ``:4096:2:16:8`` (8.125 MiB), from Hopper on 32 MiB
    (PyTorch's notes on CUDA semantics, "cuBLAS workspaces"; NVIDIA's cuBLAS documentation,
    ``cublasSetWorkspace``), unless CUBLAS_WORKSPACE_CONFIG says otherwise.

    Args:
        arch: compute capability, `Device.arch`.
        threads: the caller's and autograd's.
    """
    return threads * (32 * _MIB if arch >= 90 else 2 * 4 * _MIB + 8 * 16 * 1024)


def workspace_of(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    capability: tuple[int, int] = triton_runtime.DEFAULT_CAPABILITY,
) -> int:
    """Bytes that one dispatched operation needs on a GPU beyond its arguments and results.

    Args:
        func, args, kwargs: as ``__torch_dispatch__`` was given them; fake tensors of any device.
        capability: of the GPU.

    Returns:
        Scratch of the library's own operators, exactly, in the form they have without the optional
        module of CUDA kernels; of flash attention's backward pass what PyTorch allocates for it; 0
        for everything else, which is not to say that cuDNN takes none.
    """
    kernel = kernel_of(func)
    if kernel is not None:
        return _watched(kernel, args, kwargs, capability)
    if func._overloadpacket in _FLASH_BACKWARD:
        return _flash_backward(args[1])
    return 0


class Workspaces:
    """`workspace_of`, remembered by operation, shapes, strides and dtypes.

    Attributes:
        peak: the largest so far.
    """

    def __init__(self, capability: tuple[int, int] = triton_runtime.DEFAULT_CAPABILITY) -> None:
        self.capability = capability
        self.peak = 0
        self._known: dict[Any, int] = {}

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """The workspace of one call."""
        if kernel_of(func) is None and func._overloadpacket not in _FLASH_BACKWARD:
            return 0
        key = signature(func, args, kwargs)
        nbytes = self._known.get(key)
        if nbytes is None:
            nbytes = self._known[key] = workspace_of(func, args, kwargs, self.capability)
        self.peak = max(self.peak, nbytes)
        return nbytes


def measure_workspace(call: Callable[[], Any]) -> int:
    """Bytes a call took from PyTorch's CPU allocator, at most at once, beyond what it returned.

    Runs it once, under the profiler. What libraries take elsewhere (oneDNN's kernels, a thread's
    stack, std::vector) is not seen; PyTorch gives oneDNN's scratch space from its own allocator.
    """
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = call()
    results: Any = profile.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        live += nbytes
        peak = max(peak, live)
    del kept
    return peak - live


def _watched(
    kernel: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    capability: tuple[int, int],
) -> int:
    """Most that was alive while the kernel ran, beyond its arguments and results."""
    tracker = MemoryTracker()
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())  # the caller's fake tensors
        stack.enter_context(torch.no_grad())
        args, kwargs = tree_map_only(Tensor, _without_memory, (args, dict(kwargs)))
        recording = stack.enter_context(triton_runtime.recording(capability))
        recording.launches = deque(maxlen=0)  # type: ignore[assignment]  # would hold the scratch
        stack.enter_context(_ConvolutionsInLayout())
        stack.enter_context(tracker)
        tracker.count(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        results = kernel(*args, **kwargs)
        found = tracker.peak_bytes - tracker.live_bytes
    del results  # alive until here: what is returned is not scratch
    return found


class _ConvolutionsInLayout(TorchDispatchMode):
    """Convolutions give images the layout of what they read, as cuDNN's do and "meta"'s do not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func._overloadpacket not in (aten.convolution, aten.convolution_backward):
            return output
        read, *_, weight = filter(_is_image, args[:3])
        layout = memory_format(is_channels_last(read, weight))
        return tree_map_only(
            _is_image, lambda image: image.contiguous(memory_format=layout), output
        )


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


#: Those of other devices too: on fake tensors they stand for the GPU's.
_FLASH_BACKWARD = {
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


def _flash_backward(q: Tensor) -> int:
    """The gradient of q added up in float32, and one float32 per query; both padded.

    As aten/native/transformers/cuda/flash_attn allocates them: lengths to a multiple of 128, widths
    to one of 32.
    """
    batch, heads, length, width = q.shape
    length = -(-length // 128) * 128
    width = -(-width // 32) * 32
    return 4 * prod((batch, heads, length)) * (width + 1)
