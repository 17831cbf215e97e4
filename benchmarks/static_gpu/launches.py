"""Every Triton launch of the operators for a set of cases, as plain data that other processes take.

Operators run on tensors of the device "meta" while their launches are recorded, forward and
backward, through the public function: what is listed is what a GPU would run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.protocol import Case, tensors, with_leaves
from benchmarks.static_gpu.signature import Configuration, configuration
from rewardprop_fast import ops
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.ops import triton_runtime
from rewardprop_fast.ops.triton_runtime import Launch

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class TensorArgument:
    """A tensor that a kernel gets: the memory it spans."""

    dtype: str  # "bfloat16"
    nbytes: int
    offset: int  # bytes from the start of its storage
    storage: int  # tensors of one launch with the same number share memory


@dataclass(frozen=True)
class PlainLaunch:
    """One launch without torch and Triton objects."""

    configuration: Configuration
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # TensorArgument, numbers, None
    constexprs: dict[str, Any]
    memory: dict[str, int]  # tensor -> a number of its memory that holds in all launches of a pass

    @property
    def programs(self) -> int:
        return prod(self.grid)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that move the same bytes in the same way, in whichever 16 bits."""
        one = self.configuration
        arguments = tuple((name, _counted(value)) for name, value in sorted(self.arguments.items()))
        return (one.module, one.kernel, self.grid, tuple(sorted(one.constexprs.items())), arguments)


def _counted(argument: Any) -> Any:
    """An argument as far as it matters to the bytes that are moved."""
    if isinstance(argument, TensorArgument) and argument.dtype == "float16":
        return replace(argument, dtype="bfloat16")
    return argument


@dataclass(frozen=True)
class CaseLaunches:
    """The launches of one pass of one case on one architecture."""

    case: Case
    dtype: torch.dtype
    phase: str  # one of `PASSES`
    arch: int
    launches: tuple[PlainLaunch, ...]
    refusal: str | None = None  # why the operator's Triton form does not take the case


def has_triton(case: Case) -> bool:
    """Whether the case's operator has a Triton form."""
    return "triton" in [form.backend for form in ops.OPERATORS[case.operator].implementations]


def of_cases(cases: Iterable[Case], dtype: torch.dtype, arch: int) -> list[CaseLaunches]:
    """Record both passes of each case of an operator that has a Triton form."""
    found = []
    for case in cases:
        if not has_triton(case):
            continue
        try:
            recorded = of_case(case, dtype, arch)
        except ConfigError as error:  # the registry's: not legal, and why
            found += [CaseLaunches(case, dtype, phase, arch, (), str(error)) for phase in PASSES]
        else:
            found += [
                CaseLaunches(case, dtype, phase, arch, launches)
                for phase, launches in zip(PASSES, recorded, strict=True)
            ]
    return found


def of_case(case: Case, dtype: torch.dtype, arch: int) -> tuple[tuple[PlainLaunch, ...], ...]:
    """The launches of the forward and of the backward pass."""
    capability = divmod(arch, 10)
    with triton_runtime.recording(capability) as gathered, ops.backend("triton", strict=True):
        arguments = with_leaves(case, case.make("meta", dtype))
        outputs = tensors(case.call(**arguments))
        boundary = len(gathered.launches)
        if case.leaves:
            torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    found = [plain(launch, arch) for launch in gathered.launches]
    return tuple(found[:boundary]), tuple(found[boundary:])


def record(run: Callable[[], Any], arch: int) -> list[PlainLaunch]:
    """The launches of any function on meta tensors."""
    with triton_runtime.recording(divmod(arch, 10)) as gathered:
        run()
    return [plain(launch, arch) for launch in gathered.launches]


def plain(launch: Launch, arch: int) -> PlainLaunch:
    storages: dict[int, int] = {}

    def argument(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = storages.setdefault(value.untyped_storage()._cdata, len(storages))
        size = value.element_size()
        span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        nbytes = span * size if value.numel() else 0
        dtype = str(value.dtype).removeprefix("torch.")
        return TensorArgument(dtype, nbytes, value.storage_offset() * size, storage)

    arguments = {name: argument(value) for name, value in launch.arguments.items()}
    # The recording keeps every tensor alive, so addresses of storages are not used twice.
    memory = {
        name: value.untyped_storage()._cdata
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor)
    }
    width, height, depth = (*launch.grid, 1, 1)[:3]
    return PlainLaunch(
        configuration(launch, arch), (width, height, depth), arguments, launch.constexprs, memory
    )
