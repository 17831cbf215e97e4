"""The specialisation that Triton's JIT would choose at run time for a recorded launch.

Triton's own binder is asked, so that pointers and integers divisible by 16 and integers equal to 1
are treated as a real launch would treat them. Tensors on the device "meta" count as aligned, as
torch's allocators align real ones; a view into one keeps its offset.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from rewardprop_fast.ops.triton_runtime import Launch


@dataclass(frozen=True)
class Configuration:
    """One compilation: everything is plain data, so that it can go to another process."""

    module: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]  # parameters known to be divisible by 16
    num_warps: int
    num_stages: int

    @property
    def key(self) -> str:
        """Short and the same in every process."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def function(self) -> Any:
        """The Triton kernel."""
        return getattr(import_module(self.module), self.kernel)


class Aligned:
    """Stands for a tensor where the binder asks for its dtype and address."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


def configuration(launch: Launch, arch: int) -> Configuration:
    """What Triton would compile for this launch on a device of architecture ``arch`` (86)."""
    kernel = launch.kernel
    arguments = {
        name: Aligned(value) if isinstance(value, Tensor) else value
        for name, value in launch.arguments.items()
    }
    bound, specialization, _ = _binder(kernel, arch)(**arguments, **launch.constexprs)
    signature = {
        parameter.name: kind
        for parameter, (kind, _) in zip(kernel.params, specialization, strict=True)
    }
    constexprs = {name: bound[name] for name, kind in signature.items() if kind == "constexpr"}
    aligned = tuple(
        parameter.name
        for parameter, (kind, extra) in zip(kernel.params, specialization, strict=True)
        if kind != "constexpr" and isinstance(extra, str) and "D" in extra
    )
    return Configuration(
        kernel.fn.__module__,
        kernel.fn.__name__,
        signature,
        constexprs,
        aligned,
        launch.num_warps,
        launch.num_stages,
    )


@cache
def _binder(kernel: Any, arch: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)
